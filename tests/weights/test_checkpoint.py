"""A model on disk: it comes back as it was, anywhere, or one line says what is wrong with it."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixellm_jax.errors import InputError
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.weights import checkpoint, torch_layout
from tests.support.tiny_checkpoint import change_json, read_tensors


def parameters(model: nnx.Module) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def refusal(folder, call=checkpoint.load_model) -> str:
    with pytest.raises(InputError) as caught:
        call(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_has_the_values_and_dtypes_of_the_source(tiny):
    model = checkpoint.load_model(tiny.jax)
    source = read_tensors(tiny.hf) | read_tensors(tiny.clip)
    found = parameters(model)
    entries = torch_layout.table(model.config, kind="required")
    for entry in entries:
        layers = [entry.to_ours(source[name]) for name in entry.names]
        expected = np.stack(layers) if entry.count else layers[0]
        np.testing.assert_array_equal(found.pop(entry.path), expected)
        assert expected.dtype == np.float32
    assert found.keys() == torch_layout.released_fusion(model.config).keys()
    np.testing.assert_array_equal(
        found["codebook.token_fusion"], np.full((2, 3), np.float32(1 / 6))
    )
    np.testing.assert_array_equal(found["codebook.mask_fusion"], np.full(2, np.float32(0.5)))


def test_compute_dtype_can_be_chosen_and_leaves_the_parameters(tiny):
    model = checkpoint.load_model(tiny.jax, dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {value.dtype.name for value in parameters(model).values()} == {"float32"}
    with pytest.raises(InputError, match="dtype='float16'"):
        checkpoint.load_model(tiny.jax, dtype="float16")


def test_model_is_restored_onto_every_device_of_a_mesh(tiny):
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec())
    plain = parameters(checkpoint.load_model(tiny.jax))
    for name, value in parameters(checkpoint.load_model(tiny.jax, sharding=sharding)).items():
        assert value.sharding == sharding
        assert len(value.addressable_shards) == 8
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, plain[name])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_device_reads_its_own_part(tiny, axis, monkeypatch):
    name = "language_model.layers.gate.weight"  # 2 layers of 64 x 96
    array = checkpoint.open_arrays(tiny.jax)[name]
    axes = [None] * 3
    axes[axis] = "model"
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("model", "data"))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    shapes = []
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda part: shapes.append(part.shape) or read(part))
    value = checkpoint.restore(array, sharding)
    part = [size // (2 if i == axis else 1) for i, size in enumerate(array.shape)]
    assert {tuple(shape) for shape in shapes} == {tuple(part)}
    assert value.sharding == sharding
    np.testing.assert_array_equal(value, read(array))


def test_unknown_key_in_a_config_edited_by_hand_gets_a_suggestion(copied):
    folder = copied("jax")
    change_json(folder / "config.json", image_gird=4)
    line = refusal(folder)
    assert line.startswith(f"{folder / 'config.json'}: ")
    assert "unknown key 'image_gird'; did you mean 'image_grid'?" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_grid": "4"}, "image_grid: expected int, found '4'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"template": "vicuna"}, "config.template: found 'vicuna', expected one of llava_v1"),
        ({"vision": {"canvas": 3}}, "vision.canvas=3"),
        ({"codebook": []}, "codebook: expected a group of keys"),
    ],
)
def test_wrong_value_in_a_config_names_file_and_key(copied, changes, named):
    folder = copied("jax")
    change_json(folder / "config.json", **changes)
    line = refusal(folder)
    assert line.startswith(f"{folder / 'config.json'}: ")
    assert named in line
    assert line.endswith("correct it or convert again")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' * 10_000, "\x00\xff", "9" * 5000])
def test_config_that_is_no_json_object_is_refused(copied, text):
    folder = copied("jax")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "config.json") in refusal(folder)


def test_config_that_is_not_there_is_refused(copied):
    folder = copied("jax")
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}: no such file" in refusal(folder)


@pytest.mark.parametrize("form", ["hf", "clip"])
def test_folder_of_pytorch_weights_calls_for_convert(tiny, form):
    folder = getattr(tiny, form)
    line = refusal(folder)
    assert line.startswith(f"{folder}: no params/")
    assert f"pixellm convert --hf {folder}" in line


def test_folder_that_is_not_there_and_file_are_refused(tiny, tmp_path):
    assert f"{tmp_path / 'typo'}: no such folder" in refusal(tmp_path / "typo")
    assert "config.json: no such folder" in refusal(tiny.jax / "config.json")


def test_every_wrong_array_is_named_in_one_report(copied):
    folder = copied("jax")
    values = json.loads((folder / "config.json").read_text())
    values["language"]["vocabulary"] += 5
    values["vision"]["table"] = 7
    values["decoder"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(values))
    line = refusal(folder)
    for part in (
        "language_model.embedding: found (428, 64), expected (433, 64)",
        "language_model.head: found (428, 64), expected (433, 64)",
        "vision_encoder.position: found (37, 32), expected (50, 32)",
        "pixel_decoder.transformers.1.layers.2.mlp.layers.0.weight: found nothing, expected (32",
    ):
        assert part in line


def test_array_that_is_not_of_the_model_is_named(copied):
    folder = copied("jax")
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["depth"] = 1
    (folder / "config.json").write_text(json.dumps(values))
    line = refusal(folder)
    assert "pixel_decoder.transformers.0.layers.1.mlp_norm.bias: not part of the model" in line


def test_params_folder_that_is_not_there_is_refused(copied):
    folder = copied("jax")
    shutil.rmtree(folder / "params")
    assert f"{folder}: no params/ in it" in refusal(folder)


def damage(folder, part: str, cut: str) -> None:
    """`part`: the index ("d") or the values ("ocdbt.process_0/d") of the arrays."""
    files = [folder / "params" / part] if part == "manifest.ocdbt" else (folder / "params" / part)
    for file in files if isinstance(files, list) else list(files.iterdir()):
        if cut == "removed":
            file.unlink()
        else:
            kept = {"empty": 0, "cut": min(len(file.read_bytes()) // 2, 40)}[cut]
            file.write_bytes(file.read_bytes()[:kept])


@pytest.mark.parametrize("cut", ["removed", "empty", "cut"])
@pytest.mark.parametrize("part", ["manifest.ocdbt", "d", "ocdbt.process_0/d"])
def test_damaged_arrays_are_one_line_without_noise(copied, capfd, part, cut):
    folder = copied("jax")
    damage(folder, part, cut)
    line = refusal(folder)
    assert str(folder / "params") in line
    assert "not a complete Orbax checkpoint" in line
    assert line.endswith("convert or copy it again")
    assert capfd.readouterr() == ("", "")


def test_array_whose_values_are_gone_is_not_taken_for_zeros(copied):
    folder = copied("jax")
    place = {"driver": "file", "path": f"{folder / 'params'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()
    keys = [key for key in store.list().result() if key.startswith(b"language_model.norm.weight/0")]
    assert keys
    for key in keys:
        store.write(key, None).result()
    assert "language_model.norm.weight" in refusal(folder)


def test_folder_may_have_any_name(tiny, tmp_path):
    folder = tmp_path / "a b%20c#d?é"
    shutil.copytree(tiny.jax, folder)
    np.testing.assert_array_equal(
        checkpoint.load_model(folder).codebook.mask_fusion.get_value(), [0.5, 0.5]
    )


def test_checkpoint_can_be_moved(copied, tmp_path):
    moved = copied("jax").rename(tmp_path / "moved")
    assert checkpoint.load_model(moved).config == checkpoint.read_config(moved)


def test_tokenizer_of_another_model_is_refused(copied, maker, tmp_path):
    folder = copied("jax")
    maker.write(tmp_path / "other", maker.tiny(tokens_per_scale=4))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tmp_path / "other" / "hf", folder / "tokenizer")
    line = refusal(folder, Predictor.load)
    assert str(folder / "tokenizer") in line
    assert "not the tokenizer of this model" in line


def test_tokenizer_that_is_not_there_is_refused(copied):
    folder = copied("jax")
    shutil.rmtree(folder / "tokenizer")
    assert f"{folder / 'tokenizer'}: found neither tokenizer.model" in refusal(
        folder, Predictor.load
    )
