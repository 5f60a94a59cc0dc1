"""Files of `torch.save` are read bit for bit, without PyTorch on our side."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.weights.torch_folder import open_file, open_folder, write_safetensors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]


def sample(dtype: str, *shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 50
    return (values > 0) if dtype == "bool" else values.to(getattr(torch, dtype))


def check(file: Path, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bits are those which torch.load finds."""
    opened = open_file(file)
    assert opened.keys() == expected.keys()
    for name, wanted in expected.items():
        found = opened[name].read()
        wanted = wanted.detach().contiguous()
        bits = wanted.reshape(-1).view(torch.uint8) if wanted.numel() else torch.zeros(0)
        assert opened[name].shape == found.shape == tuple(wanted.shape), name
        assert opened[name].dtype == found.dtype, name
        assert found.dtype.name == str(wanted.dtype).removeprefix("torch."), name
        assert found.tobytes() == bits.numpy().tobytes(), name


def saved(tmp_path: Path, value: object, **options: object) -> Path:
    file = tmp_path / "pytorch_model.bin"
    torch.save(value, file, **options)
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_views(tmp_path, dtype):
    base = sample(dtype, 7, 5, 3)
    state = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "row": base[3],
        "column": base[:, 2],
        "steps": base[1::2, ::3, 1],
        "flat tail": base.reshape(-1)[17:],
        "scalar view": base[6, 4, 2],
        "scalar": sample(dtype),
        "empty": base[:0],
        "empty alone": sample(dtype, 0, 4),
        "expanded": base[0, 0].expand(11, 3),
        "diagonal": base[:, :, 0].diagonal(),
        "copy": base.clone(),
    }
    file = saved(tmp_path, state)
    check(file, torch.load(file, weights_only=True))
    check(file, state)
    opened = open_file(file)
    assert len({opened[name].position for name in ("whole", "transposed", "expanded")}) == 1


def test_special_values(tmp_path):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    state = {
        "half": bits.view(torch.float16),
        "bfloat16": bits.clone().view(torch.bfloat16),
        "float": torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45]),
        "long": torch.tensor([-(1 << 63), (1 << 63) - 1]),
    }
    check(saved(tmp_path, state), state)


def test_module_parameters_and_ordered_dict(tmp_path):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 2), torch.nn.BatchNorm2d(5), torch.nn.Linear(5, 7).bfloat16()
    )
    state = module.state_dict()
    assert isinstance(state, collections.OrderedDict) and "1.num_batches_tracked" in state
    check(saved(tmp_path, state), state)
    parameters = dict(module.named_parameters())
    parameters["0.weight"].note = "kept by _rebuild_parameter_with_state"
    check(saved(tmp_path, parameters), parameters)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_wrapped(tmp_path, wrapper):
    state = torch.nn.Linear(3, 2).state_dict()
    rest = {"epoch": 3, "lr": 0.1, "dtype": torch.float16, "shape": torch.Size([2, 3]), "x": None}
    check(saved(tmp_path, {wrapper: state, **rest, "args": {"names": ["a", ("b", True)]}}), state)
    check(saved(tmp_path, {**state, **rest}), state)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.float64(3), "numpy"),
        (torch.device("cpu"), "torch.device"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.float8_e4m3fn), "_rebuild_tensor_v3"),
        (torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        ({"deep": torch.ones(2)}, "entry 'x' (dict)"),
        ({1, 2}, "'__builtin__.set'"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value, found):
    with pytest.raises(InputError, match=found.replace("(", r"\(").replace(")", r"\)")):
        open_file(saved(tmp_path, {"w": torch.ones(2), "x": value}))


def test_negative_view_is_refused(tmp_path):
    view = torch.ones(3, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    with pytest.raises(InputError, match="_rebuild_tensor_v2"):
        open_file(saved(tmp_path, {"w": view}))


def test_legacy_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="before PyTorch 1.6.*_use_new_zipfile_serialization=True"):
        open_file(saved(tmp_path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False))


def test_shards_with_index(tmp_path):
    state = {f"layer.{number}": sample("bfloat16", 3, number + 1) for number in range(5)}
    names = list(state)
    shards = {"1": names[:2], "2": names[2:]}
    weight_map = {}
    for number, held in shards.items():
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: state[key] for key in held}, tmp_path / name)
        weight_map |= dict.fromkeys(held, name)
    without_index = open_folder(tmp_path)
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    opened = open_folder(tmp_path)
    assert opened == without_index and opened.keys() == state.keys()
    for name, wanted in state.items():
        assert opened[name].dtype == ml_dtypes.bfloat16
        assert opened[name].read().astype(np.float32).tolist() == wanted.float().tolist()


def test_safetensors_of_ours_in_torch(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    values = {"w": sample("float32", 5, 3).numpy().T, "b": np.ones((2, 3), ml_dtypes.bfloat16)}
    write_safetensors(tmp_path / "model.safetensors", values)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["b"].dtype == torch.bfloat16 and loaded["b"].float().tolist() == [[1] * 3] * 2
    assert np.array_equal(loaded["w"].numpy(), values["w"])
