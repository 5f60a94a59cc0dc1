"""PyTorch folders -> checkpoint -> PyTorch folders: bit for bit, or one report says why not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pixellm_jax.config import CodebookConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint, convert, export, torch_layout
from pixellm_jax.weights.source import MergedTensor, open_merged
from pixellm_jax.weights.torch_config import OWN_KEY
from pixellm_jax.weights.torch_folder import write_safetensors
from tests.support.tiny_checkpoint import (
    assert_same_tensors,
    change_json,
    read_arrays,
    read_tensors,
    write_tensors,
)

QUERY = "model.layers.1.self_attn.q_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"


def refusal(model: Path, vision: Path, out: Path, **options) -> str:
    """The one line that a conversion ends with; nothing may be left of it."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert.convert(model, vision, out, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


# Round trip


@pytest.fixture(scope="module", params=["N=3 L=2", "N=1 L=3", "N=1 L=1"])
def round_trip(request, maker, tmp_path_factory) -> Path:
    """A folder with `hf`, `clip`, the checkpoint `jax` and its export `again`."""
    tokens, scales = (int(size[2:]) for size in request.param.split())
    folder = tmp_path_factory.mktemp("round_trip")
    maker.write(folder, maker.tiny(tokens, scales), dtype=ml_dtypes.bfloat16, seed=scales)
    model, vision = read_tensors(folder / "hf"), read_tensors(folder / "clip")
    for i in range(2):
        model[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.float32([1, 0.5 / 3])
    model["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = np.arange(3)
    vision["vision_model.embeddings.position_ids"] = np.arange(37)[None]
    # Bits that arithmetic would not keep.
    model["lm_head.weight"][0, :4] = [np.nan, np.inf, -0.0, 1e-40]
    write_tensors(folder / "hf", model)
    write_tensors(folder / "clip", vision)
    change_json(folder / "hf" / "config.json", custom={"kept": [1, "two"]})
    (folder / "hf" / "generation_config.json").write_text('{"max_new_tokens": 9}')
    convert.convert(folder / "hf", folder / "clip", folder / "jax")
    export.export(folder / "jax", folder / "again")
    return folder


def test_export_has_every_tensor_bit_for_bit(round_trip):
    expected = read_tensors(round_trip / "hf")
    del expected["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"]
    found = read_tensors(round_trip / "again")
    assert_same_tensors(found, expected)
    assert {array.dtype.name for array in found.values()} == {"float32", "bfloat16"}
    vision = read_tensors(round_trip / "again" / export.VISION_FOLDER)
    assert_same_tensors(vision, read_tensors(round_trip / "clip"))
    assert vision["vision_model.embeddings.position_ids"].dtype == np.int64


def test_export_has_the_configs_and_the_tokenizer(round_trip):
    old, new = round_trip / "hf", round_trip / "again"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((new / name).read_text()) == json.loads((old / name).read_text())
    clip = json.loads((round_trip / "clip" / "config.json").read_text())
    assert json.loads((new / export.VISION_FOLDER / "config.json").read_text()) == clip
    assert (new / "tokenizer.model").read_bytes() == (old / "tokenizer.model").read_bytes()
    config = checkpoint.read_config(round_trip / "jax")
    text = "It is [SEG0] [SEG] </s> <im_start>"
    vocabularies = [Vocabulary.load(place, scales=config.codebook.scales) for place in (old, new)]
    assert vocabularies[0].encode(text) == vocabularies[1].encode(text)


def test_second_conversion_gives_the_same_checkpoint(round_trip, tmp_path):
    again = round_trip / "again"
    config = convert.convert(again, again / export.VISION_FOLDER, tmp_path / "jax")
    assert config == checkpoint.read_config(round_trip / "jax")
    for part in (checkpoint.PARAMS, checkpoint.UNUSED):
        assert_same_tensors(
            read_arrays(tmp_path / "jax", part), read_arrays(round_trip / "jax", part)
        )


def test_config_of_the_checkpoint_is_that_of_the_source(round_trip):
    own = json.loads((round_trip / "hf" / "config.json").read_text())[OWN_KEY]
    found = json.loads((round_trip / "jax" / "config.json").read_text())
    assert found == own


def test_released_config_without_our_key_goes_round(maker, tmp_path):
    """What the released config.json says and the tensors show is enough, and stays as it is."""
    tiny = maker.tiny()
    vision = dataclasses.replace(tiny.vision, canvas=448, taps=(-2, -11))
    decoder = dataclasses.replace(tiny.decoder, heads=8, width=64, depth=3, mask_tokens=5)
    config = dataclasses.replace(tiny, vision=vision, decoder=decoder, image_grid=16)
    maker.write(tmp_path, config)
    source = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert OWN_KEY not in source
    found = convert.convert(tmp_path / "hf", tmp_path / "clip", tmp_path / "jax")
    assert found.decoder == decoder
    assert found.vision == vision
    assert found.codebook == CodebookConfig(tokens_per_scale=3, scales=2)
    export.export(tmp_path / "jax", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == source

    # What the released format cannot say is added, also where it was said otherwise before.
    for heads in (4, 2):
        values = json.loads((tmp_path / "jax" / "config.json").read_text())
        values["vision"]["position_resize"] = "correct"
        values["vision"]["heads"] = heads
        (tmp_path / "jax" / "config.json").write_text(json.dumps(values))
        shutil.rmtree(tmp_path / "again")
        if heads == 4:
            export.export(tmp_path / "jax", tmp_path / "again")
            exported = json.loads((tmp_path / "again" / "config.json").read_text())
            assert exported.pop(OWN_KEY) == values
            assert exported == source
        else:  # not the heads of the arrays
            with pytest.raises(InputError, match=r"vision_encoder\.layers\.query\.weight: found"):
                export.export(tmp_path / "jax", tmp_path / "again")
            assert not (tmp_path / "again").exists()


def test_config_changed_after_the_import_is_exported(copied, tmp_path):
    folder = copied("jax")
    change_json(folder / "config.json", dtype="bfloat16", template="llava_llama_2")
    export.export(folder, tmp_path / "again")
    again = tmp_path / "again"
    config = convert.convert(again, again / export.VISION_FOLDER, tmp_path / "second")
    assert (config.dtype, config.template) == ("bfloat16", "llava_llama_2")
    config = convert.convert(
        again, again / export.VISION_FOLDER, tmp_path / "third", template="llava_v1"
    )
    assert config.template == "llava_v1"


def test_trained_fusion_weights_go_round(copied, tiny, tmp_path):
    folder = copied("hf")
    tensors = read_tensors(folder)
    fusion = {
        "model.codebook.token_fusion": np.float32([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
        "model.codebook.mask_fusion": np.float32([0.25, 0.75]),
    }
    write_tensors(folder, tensors | fusion)
    convert.convert(folder, tiny.clip, tmp_path / "jax")
    export.export(tmp_path / "jax", tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), tensors | fusion)
    model = checkpoint.load_model(tmp_path / "jax")
    np.testing.assert_array_equal(model.codebook.mask_fusion.get_value(), [0.25, 0.75])


def test_layers_of_different_precision_keep_their_values(copied, tiny, tmp_path):
    folder = copied("hf")
    tensors = read_tensors(folder)
    tensors[QUERY] = tensors[QUERY].astype(ml_dtypes.bfloat16)
    other = QUERY.replace("layers.1", "layers.0")
    tensors[other] = tensors[other].astype(np.float16)
    write_tensors(folder, tensors)
    convert.convert(folder, tiny.clip, tmp_path / "jax")
    stack = read_arrays(tmp_path / "jax")["language_model.layers.query.weight"]
    for i, name in enumerate((other, QUERY)):
        back = stack[i].transpose(1, 2, 0).reshape(64, 64)
        np.testing.assert_array_equal(back.astype(np.float32), tensors[name].astype(np.float32))


def test_export_in_several_files_is_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 200_000)
    seen = []
    export.export(
        tiny.jax, tmp_path / "again", progress=lambda new, total: seen.append((new, total))
    )
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tiny.hf))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tiny.hf)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert sum(new for new, _ in seen) == seen[0][1]


def test_conversion_is_deterministic_and_counts_its_bytes(tiny, tmp_path):
    seen = []
    convert.convert(tiny.hf, tiny.clip, tmp_path / "jax", progress=lambda *step: seen.append(step))
    tensors = read_tensors(tiny.hf) | read_tensors(tiny.clip)
    fusion = 4 * (2 * 3 + 2)
    assert {total for _, total in seen} == {sum(a.nbytes for a in tensors.values()) + fusion}
    assert sum(new for new, _ in seen) == seen[0][1]
    for part in (checkpoint.PARAMS, checkpoint.UNUSED):
        assert_same_tensors(read_arrays(tmp_path / "jax", part), read_arrays(tiny.jax, part))
    for name in ("config.json", "source/config.json", "tokenizer/added_tokens.json"):
        assert (tmp_path / "jax" / name).read_text() == (tiny.jax / name).read_text()


def test_damaged_side_of_a_checkpoint_stops_the_export(copied, tmp_path):
    folder = copied("jax")
    shutil.rmtree(folder / "unused")
    with pytest.raises(InputError, match=r"unused: missing vision_model\..*iou_prediction_head"):
        export.export(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Other forms of the source


@pytest.mark.torch
def test_sharded_bin_is_the_same_as_safetensors(copied, tiny, tmp_path):
    import torch

    folder = copied("hf")
    tensors = read_tensors(folder)
    write_tensors(folder, {})
    names = sorted(tensors)
    index = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        shard = {name: torch.from_numpy(tensors[name]) for name in names[i::3]}
        torch.save(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    convert.convert(folder, tiny.clip, tmp_path / "jax")
    assert_same_tensors(read_arrays(tmp_path / "jax"), read_arrays(tiny.jax))


def lora_folder(folder: Path, *, base: str = "", rank: int = 8, alpha: float = 16) -> dict:
    """Turns a folder into a training state dict; returns the merged tensors by our own hand."""
    tensors = read_tensors(folder)
    random = np.random.default_rng(0)
    merged, written = dict(tensors), {}
    for name, weight in tensors.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if name in (QUERY, VALUE):
            a = random.standard_normal((rank, weight.shape[1]), np.float32)
            b = random.standard_normal((weight.shape[0], rank), np.float32)
            merged[name] = weight + np.float32(alpha / rank) * (b @ a)
            written[f"{stem}.lora_A.default.weight"] = a
            written[f"{stem}.lora_B.default.weight"] = b
            written[f"{stem}{base}.weight"] = weight
        else:
            written[f"base_model.model.{name}"] = weight
    tower = "base_model.model.model.vision_tower.vision_tower.vision_model"
    written[f"{tower}.pre_layrnorm.weight"] = np.ones(5, np.float32)
    written[f"{tower}.embeddings.position_ids"] = np.arange(5)
    write_tensors(folder, written)
    return merged


def test_training_state_with_low_rank_pairs_is_merged(copied, tiny, tmp_path):
    folder = copied("hf")
    merged = lora_folder(folder)
    convert.convert(folder, tiny.clip, tmp_path / "jax")
    export.export(tmp_path / "jax", tmp_path / "again")
    found = read_tensors(tmp_path / "again")
    for name in (QUERY, VALUE):
        np.testing.assert_allclose(found[name], merged[name], rtol=1e-6, atol=1e-6)
        merged[name] = found[name]
    assert_same_tensors(found, merged)


@pytest.mark.parametrize("base", ["", ".base_layer"])
@pytest.mark.parametrize(
    ("file", "option", "times"), [(32, None, 2), (32, 4.0, 0.25), (None, 8.0, 0.5)]
)
def test_scale_of_low_rank_pairs_comes_from_option_then_file(copied, base, file, option, times):
    folder = copied("hf")
    plain = read_tensors(folder)[QUERY]
    sixteen = lora_folder(folder, base=base)[QUERY]
    if file is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": file, "r": 8}))
    found, problems = open_merged(folder, option)
    assert not any(problems.values())
    change = found[QUERY].read() - plain
    np.testing.assert_allclose(change, times * (sixteen - plain), rtol=1e-4, atol=1e-5)


def test_merging_rounds_once_to_the_dtype_of_the_weight():
    class Held:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def read(self):
            return self.array

    weight = np.full((2, 2), 1, ml_dtypes.bfloat16)
    a, b = np.full((1, 2), 2**-5, np.float32), np.full((2, 1), 2**-5, np.float32)
    held = [Held(array) for array in (weight, a, b)]
    merged = MergedTensor(weight=held[0], a=held[1], b=held[2], scale=16.0)
    assert merged.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(merged.read(), np.full((2, 2), 1 + 2**-6, ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ({"lora_alpha": "big"}, "lora_alpha is 'big'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ],
)
def test_adapter_config_that_cannot_be_followed_is_refused(copied, tiny, tmp_path, adapter, named):
    folder = copied("hf")
    lora_folder(folder)
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert line.startswith(f"{folder / 'adapter_config.json'}: ") and named in line


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out"])
def test_an_alpha_of_the_caller_hides_no_other_kind_of_adapter(copied, key):
    folder = copied("hf")
    lora_folder(folder)
    adapter = {"lora_alpha": "replaced by the caller's", key: {"q_proj": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(InputError, match=f"{key} is .* not supported"):
        open_merged(folder, 8.0)


def test_all_faults_of_low_rank_pairs_are_in_one_report_with_the_others(copied, tiny, tmp_path):
    folder = copied("hf")
    lora_folder(folder)
    tensors = read_tensors(folder)
    prefix = "base_model.model."
    del tensors[f"{prefix}{QUERY.removesuffix('.weight')}.lora_B.default.weight"]
    value = f"{prefix}{VALUE.removesuffix('.weight')}.lora_A.default.weight"
    tensors[value] = tensors[value][:, 1:]
    stray = f"{prefix}model.layers.9.mlp.up_proj"
    tensors[f"{stray}.lora_A.default.weight"] = np.ones((8, 64), np.float32)
    tensors[f"{stray}.lora_B.default.weight"] = np.ones((96, 8), np.float32)
    tensors["model.norm.weight"] = tensors[f"{prefix}model.norm.weight"]
    del tensors[f"{prefix}lm_head.weight"]
    tensors[f"{prefix}model.odd"] = np.ones(1, np.float32)
    write_tensors(folder, tensors)
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert line.startswith(f"{folder}: ")
    assert "held twice: model.norm.weight;" in line
    pairs = line.partition("low-rank pair without its match: ")[2].partition(";")[0]
    assert QUERY in pairs
    assert f"{VALUE} (32, 64) with A (8, 63) and B (32, 8)" in pairs
    assert "model.layers.9.mlp.up_proj.weight" in pairs
    assert "missing: lm_head.weight;" in line
    assert "unknown: model.odd" in line


def test_whole_clip_with_its_text_side_is_accepted(copied, tiny, tmp_path):
    clip = copied("clip")
    tensors = read_tensors(clip)
    text = {
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "text_model.embeddings.token_embedding.weight": np.ones((9, 3), np.float32),
        "text_projection.weight": np.ones((3, 3), np.float32),
        "visual_projection.weight": np.ones((3, 3), np.float32),
        "logit_scale": np.float32(4.6),
    }
    write_tensors(clip, tensors | text)
    vision = json.loads((clip / "config.json").read_text())
    whole = {"model_type": "clip", "vision_config": vision, "text_config": {"hidden_size": 3}}
    (clip / "config.json").write_text(json.dumps(whole))
    convert.convert(tiny.hf, clip, tmp_path / "jax")
    assert_same_tensors(read_arrays(tmp_path / "jax"), read_arrays(tiny.jax))
    export.export(tmp_path / "jax", tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tiny.hf))
    assert_same_tensors(read_tensors(tmp_path / "again" / "vision_tower"), tensors)


# Refusals


def test_every_wrong_tensor_of_both_folders_is_in_one_report(copied, tmp_path):
    model, clip = copied("hf"), copied("clip")
    tensors, vision = read_tensors(model), read_tensors(clip)
    missing = ["model.norm.weight", "model.mask_decoder.level_embed.weight", QUERY]
    for name in missing:
        del tensors[name]
    tensors |= {"model.extra": np.ones(2, np.float32), "head.odd": np.ones(2, np.float32)}
    wrong = {
        "model.embed_tokens.weight": (427, 64),
        "model.mask_decoder.mask_tokens.weight": (5, 32),
        "model.mask_decoder.transformer.1.layers.0.mlp.lin1.weight": (63, 32),
        "model.image_feature_neck.2.weight": (32, 32, 3),
    }
    tensors |= {name: np.ones(shape, np.float32) for name, shape in wrong.items()}
    tensors[VALUE] = tensors[VALUE].astype(np.int8)
    write_tensors(model, tensors)
    del vision["vision_model.post_layernorm.bias"]
    vision["vision_model.embeddings.class_embedding"] = np.ones(31, np.float32)
    vision["vision_model.head.weight"] = np.ones(31, np.float32)
    write_tensors(clip, vision)

    line = refusal(model, clip, tmp_path / "jax")
    of_model, of_clip = line.split(" | ")
    assert of_model.startswith(f"{model}: ") and of_clip.startswith(f"{clip}: ")
    parts = dict(part.split(": ", 1) for part in of_model.removeprefix(f"{model}: ").split("; "))
    assert set(parts["missing"].split(", ")) == set(missing)
    assert set(parts["unknown"].split(", ")) == {"model.extra", "head.odd"}
    assert f"{VALUE} int8" in parts["no floating point numbers"]
    for name, shape in wrong.items():
        assert f"{name} {shape}, expected (" in parts["wrong shape"]
    assert parts["wrong shape"].count("expected") == len(wrong)
    assert "missing: vision_model.post_layernorm.bias;" in of_clip
    assert "unknown: vision_model.head.weight;" in of_clip
    assert "wrong shape: vision_model.embeddings.class_embedding (31,), expected (32,)" in of_clip


@pytest.mark.parametrize("part", ["mask_decoder", "prompt_encoder", "text_hidden_fcs"])
def test_all_names_of_a_missing_part_are_in_the_report(copied, tiny, tmp_path, part):
    folder = copied("hf")
    tensors = read_tensors(folder)
    gone = [name for name in tensors if f".{part}." in name]
    write_tensors(folder, {name: tensors[name] for name in tensors.keys() - set(gone)})
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert len(gone) >= 4
    for name in gone:
        assert name in line


def test_tensor_in_two_shards_is_named(copied, tiny, tmp_path):
    folder = copied("hf")
    tensors = read_tensors(folder)
    write_tensors(folder, tensors)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    twice = {"model.norm.weight": tensors["model.norm.weight"]}
    write_safetensors(folder / "model-00002-of-00002.safetensors", twice)
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert str(folder) in line and "in two files: 'model.norm.weight'" in line


def test_vision_encoder_of_another_width_is_said_so(maker, tiny, tmp_path):
    other = dataclasses.replace(maker.tiny(), vision=VisionConfig(width=48, layers=18, heads=4))
    other = dataclasses.replace(other.vision, mlp=64, canvas=112, table=6)
    maker.write(tmp_path / "other", dataclasses.replace(maker.tiny(), vision=other))
    clip = tmp_path / "other" / "clip"
    line = refusal(tiny.hf, clip, tmp_path / "jax")
    assert line == (
        f"{clip}: a vision encoder of width 48, but model.mm_projector.0.weight of {tiny.hf} takes "
        "width 32; give the CLIP folder that the model was trained with"
    )


def test_folders_given_the_wrong_way_round_are_refused(tiny, tmp_path):
    line = refusal(tiny.clip, tiny.hf, tmp_path / "jax")
    assert f"{tiny.hf / 'config.json'}: unknown model type 'llava'; expected a CLIP" in line


def test_tokenizer_with_more_ids_than_rows_is_refused(copied, tiny, tmp_path):
    folder = copied("hf")
    added = json.loads((folder / "added_tokens.json").read_text())
    change_json(folder / "added_tokens.json", **{"<new>": max(added.values()) + 1})
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert line.startswith(f"{folder}: the tokenizer has 429 ids, the embeddings have 428 rows")


def test_tokenizer_without_codebook_is_refused(copied, tiny, tmp_path):
    folder = copied("hf")
    (folder / "added_tokens.json").write_text("{}")
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert str(folder) in line and "[SEG]" in line and "<im_start>" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"num_key_value_heads": 3}, "language.kv_heads=3"),
        ({"head_dim": 15}, "language.head=15"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_parameters": 5}, "rope_parameters is 5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"pad_train_clip_images": False}, "pad_train_clip_images is false"),
        ({"mm_vision_select_layer": 99}, "vision.taps=(99, -11)"),
        ({"model_type": "gpt2"}, "unknown model type 'gpt2'"),
        ({"model_type": ["llava"]}, "unknown model type ['llava']"),
        ({OWN_KEY: 3}, f"{OWN_KEY} is 3"),
        ({OWN_KEY: {"imge_grid": 4}}, "did you mean 'image_grid'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_that_cannot_be_is_named_with_its_file(copied, tiny, tmp_path, changes, named):
    folder = copied("hf")
    change_json(folder / "config.json", **({OWN_KEY: None} | changes))
    line = refusal(folder, tiny.clip, tmp_path / "jax")
    assert line.startswith(f"{folder / 'config.json'}: ")
    assert named in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "siglip"}, "unknown model type 'siglip'"),
        ({"model_type": "clip", "vision_config": [1]}, "vision_config is [1]"),
    ],
)
def test_vision_setting_that_cannot_be_is_named_with_its_file(
    copied, tiny, tmp_path, changes, named
):
    clip = copied("clip")
    change_json(clip / "config.json", **changes)
    line = refusal(tiny.hf, clip, tmp_path / "jax")
    assert line.startswith(f"{clip / 'config.json'}: ")
    assert named in line


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_conversion_that_dies_half_way_leaves_nothing(tiny, tmp_path, error):
    written = 0

    def die(new: int, total: int) -> None:
        nonlocal written
        written += new
        if written > total / 2:
            assert any(tmp_path.glob(".jax.*/*"))  # half of it is there by now
            raise error

    with pytest.raises(error):
        convert.convert(tiny.hf, tiny.clip, tmp_path / "jax", progress=die)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_export_that_dies_half_way_leaves_nothing(tiny, tmp_path, error):
    def die(new: int, total: int) -> None:
        if new:
            assert any(tmp_path.glob(".again.*/*.safetensors"))
            raise error

    with pytest.raises(error):
        export.export(tiny.jax, tmp_path / "again", progress=die)
    assert os.listdir(tmp_path) == []


def test_file_that_vanishes_half_way_is_one_line(copied, tiny, tmp_path):
    folder = copied("hf")
    (tmp_path / "outs").mkdir()

    def vanish(new: int, total: int) -> None:
        if new:
            (folder / "model-00001.safetensors").unlink(missing_ok=True)

    line = refusal(folder, tiny.clip, tmp_path / "outs" / "jax", progress=vanish)
    assert str(folder / "model-00001.safetensors") in line


@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint"])
def test_existing_out_is_refused_and_kept(tiny, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "checkpoint":
        shutil.copytree(tiny.jax, out)
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.write_text("mine")
    line = refusal(tiny.hf, tiny.clip, out)
    assert line.startswith(f"{out}: there is already a ")
    with pytest.raises(InputError, match="there is already a"):
        export.export(tiny.jax, out)


def test_table_and_unused_name_every_tensor_once(tiny):
    config = checkpoint.read_config(tiny.jax)
    for source, folder in ((torch_layout.MODEL, tiny.hf), (torch_layout.VISION, tiny.clip)):
        rows = torch_layout.table(config, source=source)
        names = [name for row in rows if row.kind != "optional" for name in row.names]
        assert len(names) == len(set(names))
        assert set(names) == read_tensors(folder).keys()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -1.0])
def test_alpha_is_a_positive_number(tiny, tmp_path, alpha):
    with pytest.raises(InputError, match="lora_alpha .*above 0"):
        convert.convert(tiny.hf, tiny.clip, tmp_path / "jax", lora_alpha=alpha)


def test_form_of_the_position_table_can_be_chosen(tiny, tmp_path):
    released = convert.convert(tiny.hf, tiny.clip, tmp_path / "released")
    correct = convert.convert(tiny.hf, tiny.clip, tmp_path / "correct", position_resize="correct")
    found = (released.vision.position_resize, correct.vision.position_resize)
    assert found == ("released", "correct")
    assert checkpoint.read_config(tmp_path / "correct") == correct
