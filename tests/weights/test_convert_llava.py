"""LLaVA and CLIP folders -> where a training starts: old weights bit for bit, new ones by seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pixellm_jax.cli.main import main
from pixellm_jax.config import CodebookConfig
from pixellm_jax.errors import InputError
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.weights import (
    checkpoint,
    convert,
    convert_llava,
    export,
    torch_config,
    torch_layout,
)
from pixellm_jax.weights.convert_llava import start_from_llava
from pixellm_jax.weights.torch_config import OWN_KEY, ConfigFile
from tests.support.tiny_checkpoint import (
    assert_same_tensors,
    change_json,
    read_arrays,
    read_tensors,
    write_tensors,
)

OPTIONS = {
    "codebook": CodebookConfig(tokens_per_scale=2),
    "canvas": 56,
    "template": "llava_llama_2",
    "position_resize": "released",
}
COMMAND = [
    *("--from-llava", "--tokens-per-scale", "2", "--canvas", "56"),
    *("--template", "llava_llama_2", "--position-resize", "released"),
]
NEW = ["codebook", "image_projector", "mask_projector", "pixel_decoder"]


class Llava(NamedTuple):
    """A LLaVA folder, its CLIP folder, the checkpoint made of them, and what was said of it."""

    model: Path
    clip: Path
    jax: Path
    start: convert_llava.Start


def make(maker: ModuleType, folder: Path, **options) -> Llava:
    """`options`: of the maker. All tests share one `ModelConfig`: compiling it is the slow part."""
    maker.write_llava(folder, maker.tiny(), **options)
    model, clip, out = folder / "hf", folder / "clip", folder / "jax"
    tensors = read_tensors(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["model.vision_tower.vision_tower.vision_model.odd"] = np.ones(3, np.float32)
    write_tensors(model, tensors)
    return Llava(model, clip, out, start_from_llava(model, clip, out, **OPTIONS))


@pytest.fixture(scope="module")
def v1(maker, tmp_path_factory) -> Llava:
    """With the three tokens of LLaVA v1, in float16 as published."""
    return make(maker, tmp_path_factory.mktemp("v1"), dtype="float16")


@pytest.fixture(scope="module")
def padded(maker, tmp_path_factory) -> Llava:
    """With one token, which is not of LLaVA."""
    folder = tmp_path_factory.mktemp("padded")
    return make(maker, folder, dtype=ml_dtypes.bfloat16, added=["[PAD]"])


@pytest.fixture(params=["v1", "padded"])
def llava(request) -> Llava:
    return request.getfixturevalue(request.param)


@pytest.fixture
def changed(v1, tmp_path):
    """A copy of the tensors of `v1` to be changed, and a function that makes a start of them."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in v1.model.glob("*"):
        if not file.match("*.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder, read_tensors(v1.model)


def refusal(model: Path, vision: Path, out: Path, **options) -> str:
    """The one line that a start ends with; nothing may be left of it."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        start_from_llava(model, vision, out, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


# What is kept


def test_loaded_model_has_the_weights_of_both_folders_bit_for_bit(llava):
    model = checkpoint.load_model(llava.jax)
    flat = nnx.to_flat_state(nnx.state(model))
    found = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}
    sources = {
        torch_layout.MODEL: read_tensors(llava.model),
        torch_layout.VISION: read_tensors(llava.clip),
    }
    compared = set()
    for entry in torch_layout.table(model.config, kind="required"):
        if entry.path.split(".")[0] in NEW:
            continue
        kept = found[entry.path]
        if entry.path in convert_llava.TABLES:
            expected = sources[torch_layout.MODEL][entry.name]
            kept = kept[: len(expected)]
        else:
            layers = [entry.to_ours(sources[entry.source][name]) for name in entry.names]
            expected = np.stack(layers) if entry.count else layers[0]
        assert kept.dtype == expected.dtype, entry.path
        assert kept.tobytes() == expected.tobytes(), entry.path
        compared |= set(entry.names)
    of_model, of_clip = (
        sources[source].keys() for source in (torch_layout.MODEL, torch_layout.VISION)
    )
    left = {
        n
        for n in of_model
        if n.startswith(convert_llava.DISCARDED) or n.endswith(torch_layout.DERIVED)
    }
    assert compared & of_model == of_model - left
    rows = torch_layout.table(model.config, kind="unused", source=torch_layout.VISION)
    assert compared & of_clip == of_clip - {row.name for row in rows}


def test_export_has_the_weights_of_both_folders_and_goes_round(v1, tmp_path):
    export.export(v1.jax, tmp_path / "again")
    again = tmp_path / "again"
    found, expected = read_tensors(again), read_tensors(v1.model)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name, array in expected.items():
        if name.startswith("model.layers.") and not name.endswith(torch_layout.DERIVED):
            assert found[name].tobytes() == array.tobytes(), name
        if name in tables:
            assert found[name][: len(array)].tobytes() == array.tobytes(), name
    assert_same_tensors(read_tensors(again / export.VISION_FOLDER), read_tensors(v1.clip))
    config = convert.convert(again, again / export.VISION_FOLDER, tmp_path / "jax")
    assert config == v1.start.config
    assert_same_tensors(read_arrays(tmp_path / "jax"), read_arrays(v1.jax))


def test_start_can_be_asked(v1):
    answer = Predictor.load(v1.jax, max_new_tokens=4)(np.zeros((50, 70, 3), np.uint8), "Hm?")
    assert answer.masks.shape[1:] == (50, 70)


# What is new


def test_vocabulary_grows_by_what_it_lacks(llava):
    old, size = llava.start.rows
    assert old == read_tensors(llava.model)["lm_head.weight"].shape[0]
    config = checkpoint.read_config(llava.jax)
    assert config == llava.start.config
    vocabulary = checkpoint.read_vocabulary(llava.jax, config)
    assert vocabulary.size == config.language.vocabulary == size
    assert vocabulary.group == tuple(range(old, old + 4))
    if "<im_start>" in json.loads((llava.model / "added_tokens.json").read_text()):
        assert (vocabulary.im_start, vocabulary.im_end, size) == (old - 2, old - 1, old + 4)
        assert vocabulary.encode("<im_patch>", bos=False) == [old - 3]
    else:
        assert (vocabulary.im_start, vocabulary.im_end, size) == (old + 4, old + 5, old + 6)
        assert vocabulary.encode("[PAD]", bos=False) == [old - 1]


def new_rows(folder: Path, old: int) -> list[np.ndarray]:
    arrays = read_arrays(folder)
    return [arrays[path][old:].astype(np.float64) for path in convert_llava.TABLES]


def assert_normal(rows: np.ndarray, scale: float) -> None:
    """Mean and deviation within five standard errors of their estimates."""
    assert rows.size >= 256
    assert abs(rows.mean()) < 5 * scale / np.sqrt(rows.size)
    assert abs(rows.std() - scale) < 5 * scale / np.sqrt(2 * rows.size)


def test_new_rows_are_drawn_as_transformers_draws_them(llava):
    grown = new_rows(llava.jax, llava.start.rows[0])
    for rows in grown:
        assert_normal(rows, 0.02)
    assert not np.array_equal(*grown)


def test_range_of_new_rows_comes_from_the_config(v1, changed, tmp_path):
    folder, tensors = changed
    write_tensors(folder, tensors)
    change_json(folder / "config.json", initializer_range=0.5)
    start_from_llava(folder, v1.clip, tmp_path / "jax", **OPTIONS)
    for rows in new_rows(tmp_path / "jax", v1.start.rows[0]):
        assert_normal(rows, 0.5)


def test_rows_without_an_id_are_cut(v1, changed, tmp_path):
    """As resize_token_embeddings does; a table may be padded to a round number of rows."""
    folder, tensors = changed
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], 7 * np.ones((40, 64), np.float16)])
    write_tensors(folder, tensors)
    start = start_from_llava(folder, v1.clip, tmp_path / "jax", **OPTIONS)
    old, size = v1.start.rows
    assert start.rows == (old + 40, size)
    arrays = read_arrays(tmp_path / "jax")
    for path, name in zip(convert_llava.TABLES, ("embed_tokens", "lm_head"), strict=True):
        expected = next(array for key, array in tensors.items() if name in key)[:size]
        assert arrays[path].tobytes() == expected.tobytes()


def test_new_parts_are_those_of_a_new_model(v1):
    """Up to what another fusion of the same operations may change in float32."""
    some = (
        "codebook.projection.layers.0.weight",
        "image_projector.layers.1.weight",
        "mask_projector.layers.0.weight",
        "pixel_decoder.positions.1.matrix",
        "pixel_decoder.transformers.1.layers.0.token_to_image.query.weight",
    )

    @jax.jit
    def draw(key):
        flat = nnx.to_flat_state(nnx.state(PixelLM(key, v1.start.config)))
        named = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
        return {name: named[name] for name in some}

    found = read_arrays(v1.jax)
    assert v1.start.initialised == tuple(NEW)
    for name, expected in draw(jax.random.key(0)).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)
    fusion = found["codebook.token_fusion"], found["codebook.mask_fusion"]
    np.testing.assert_array_equal(fusion[0], np.full((2, 2), 0.25, np.float32))
    np.testing.assert_array_equal(fusion[1], np.full(2, 0.5, np.float32))


def test_new_parts_depend_on_the_seed_alone(v1, padded, tmp_path):
    first, second = read_arrays(v1.jax), read_arrays(padded.jax)
    others = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        start_from_llava(v1.model, v1.clip, out, **OPTIONS, seed=seed)
        others.append(read_arrays(out))
    assert_same_tensors(others[0], first)
    old = v1.start.rows[0]
    for name, other in others[1].items():
        if name in convert_llava.TABLES:
            assert not np.array_equal(other[old:], first[name][old:]), name
            assert other[:old].tobytes() == first[name][:old].tobytes(), name
        elif name.split(".")[0] not in NEW:
            assert other.tobytes() == first[name].tobytes(), name
        else:
            assert second[name].tobytes() == first[name].tobytes(), name  # another vocabulary
            if name.endswith(("weight", "matrix")) and other.ndim > 1:
                assert not np.array_equal(other, first[name]), name


def test_settings_are_those_of_the_paper_or_of_the_options(v1):
    language = v1.start.config.language
    vision = torch_config.vision_config(ConfigFile.read(v1.clip))
    shapes = {"model.embed_tokens.weight": (language.vocabulary, language.width)}
    config = torch_config.llava_start_config(
        ConfigFile.read(v1.model), vision, shapes, OPTIONS["codebook"]
    )
    assert config.language == language
    paper = {"canvas": 448, "taps": (-2, -11), "position_resize": "correct"}
    assert config.vision == dataclasses.replace(vision, **paper)
    assert (config.template, config.dtype) == ("llava_v1", "bfloat16")
    vision = dataclasses.replace(config.vision, canvas=56, position_resize="released")
    assert v1.start.config == dataclasses.replace(config, vision=vision, template="llava_llama_2")


# The command


def test_command_says_what_is_new_and_what_is_left_out(v1, tmp_path, capfd):
    folders = ["--hf", str(v1.model), "--vision", str(v1.clip), "--out", str(tmp_path / "jax")]
    assert main(["convert", *folders, *COMMAND]) == 0
    assert capfd.readouterr() == (
        f"{tmp_path / 'jax'}: 2 layers of width 64, {v1.start.rows[1]} ids, 2 codebook tokens at 2 "
        "scales, pictures of 56 pixels, bfloat16, template llava_llama_2, position table released\n"
        f"drawn at random: {', '.join(NEW)}; 4 new rows of ids\n"
        f"left out: model.mm_projector, model.vision_tower of {v1.model}, which PixelLM replaces\n",
        "",
    )
    assert_same_tensors(read_arrays(tmp_path / "jax"), read_arrays(v1.jax))


def test_command_needs_the_option_for_llava_and_only_there(v1, tiny, tmp_path, capfd):
    out = ["--out", str(tmp_path / "jax")]
    llava = ["--hf", str(v1.model), "--vision", str(v1.clip)]
    pixellm = ["--hf", str(tiny.hf), "--vision", str(tiny.clip)]
    sizes = ["--scales", "2", "--canvas", "448", "--seed", "0"]
    for arguments, said in (
        (llava, f"{v1.model}: no tensor of PixelLM's own parts"),
        ([*pixellm, "--from-llava"], f"{tiny.hf}: a PixelLM folder"),
        ([*pixellm, *sizes], "--scales, --canvas, --seed: only with --from-llava"),
    ):
        assert main(["convert", *arguments, *out]) == 2
        error = capfd.readouterr().err
        assert said in error and "--from-llava" in error
    assert list(tmp_path.iterdir()) == []


# Refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"codebook": CodebookConfig(tokens_per_scale=0)}, "at least one token"),
        ({"codebook": CodebookConfig(scales=0)}, "at least one token"),
        ({"codebook": CodebookConfig(scales=4)}, "4 scales: expected at most 3"),
        ({"canvas": 450}, "canvas of 450 pixels: expected a multiple of 14"),
        ({"canvas": 0}, "canvas of 0 pixels"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, f"seed {2**32}"),
    ],
)
def test_sizes_that_cannot_be_are_refused(v1, tmp_path, options, named):
    assert named in refusal(v1.model, v1.clip, tmp_path / "jax", **options)


def test_codebook_of_another_size_in_the_tokenizer_is_refused(v1, changed, tmp_path):
    folder, tensors = changed
    write_tensors(folder, tensors)
    old = v1.start.rows[0]
    change_json(folder / "added_tokens.json", **{"[SEG0]": old, "[SEG1]": old + 1})
    codebook = CodebookConfig(tokens_per_scale=1, scales=1)
    line = refusal(folder, v1.clip, tmp_path / "jax", codebook=codebook)
    assert line.startswith(f"{folder}: found the codebook [SEG0] [SEG1], expected 1 tokens")


def test_every_wrong_tensor_is_in_one_report(v1, changed, tmp_path):
    folder, tensors = changed
    del tensors["model.norm.weight"]
    tensors["model.odd"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    write_tensors(folder, tensors)
    line = refusal(folder, v1.clip, tmp_path / "jax")
    old = v1.start.rows[0]
    assert line.startswith(f"{folder}: missing: model.norm.weight; unknown: model.odd; ")
    assert f"wrong shape: lm_head.weight {(old - 1, 64)}, expected {(old, 64)}" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "unknown model type 'gpt2'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}"),
    ],
)
def test_setting_that_cannot_be_is_named_with_its_file(v1, changed, tmp_path, changes, named):
    folder, tensors = changed
    write_tensors(folder, tensors)
    change_json(folder / "config.json", **changes)
    line = refusal(folder, v1.clip, tmp_path / "jax")
    assert line.startswith(f"{folder / 'config.json'}: ") and named in line


def test_folder_of_the_maker_is_no_pixellm(v1):
    """Or else the tests above would start from more than LLaVA has."""
    assert OWN_KEY not in json.loads((v1.model / "config.json").read_text())
    parts = {name.split(".")[1] for name in read_tensors(v1.model)}
    assert parts == {"embed_tokens", "layers", "mm_projector", "norm", "vision_tower", "weight"}
