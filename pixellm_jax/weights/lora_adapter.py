"""A folder of PyTorch weights with low-rank pairs -> plain weights, merged when they are read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from pixellm_jax.errors import InputError
from pixellm_jax.files import read_optional_json
from pixellm_jax.weights import torch_layout
from pixellm_jax.weights.torch_folder import open_folder

PREFIX = "base_model.model."
ALPHA = 16.0
"""alpha of the released training script, where no adapter_config.json says another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTensor:
    """W + (alpha / r) B A, read from the three tensors; float32 sum in the dtype of W."""

    weight: torch_layout.Tensor
    a: torch_layout.Tensor
    b: torch_layout.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of W."""
        return self.weight.dtype

    def read(self) -> np.ndarray:
        """Merges."""
        weight, a, b = (t.read().astype(np.float32) for t in (self.weight, self.a, self.b))
        return (weight + self.scale * (b @ a)).astype(self.dtype)


def open_merged(
    folder: Path, alpha: float | None = None
) -> tuple[dict[str, torch_layout.Tensor], dict[str, list[str]]]:
    """The tensors of a folder with the training prefix removed and low-rank pairs merged.

    Also what is wrong with them, by kind. `alpha` overrides what adapter_config.json says.

    Raises:
        InputError: the files, `alpha` or adapter_config.json.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"lora_alpha {alpha}: expected a number above 0")
    found = open_folder(folder)
    plain: dict[str, torch_layout.Tensor] = {}
    pairs: dict[str, dict[str, torch_layout.Tensor]] = {}
    doubled = []
    for full, tensor in found.items():
        name = full.removeprefix(PREFIX).replace(".base_layer.", ".")
        stem, marker, rest = name.partition(".lora_")
        if marker:
            side = rest.split(".")[0]
            target, key = pairs.setdefault(f"{stem}.weight", {}), side
        else:
            target, key = plain, name
        if key in target:
            doubled.append(name)
        target[key] = tensor
    alpha = _alpha(folder) if alpha is None else alpha
    lonely = []
    for name, pair in pairs.items():
        weight, a, b = plain.get(name), pair.get("A"), pair.get("B")
        if weight is None or a is None or b is None or len(pair) != 2:
            lonely.append(name)
        elif (*b.shape[:1], *a.shape[1:]) != weight.shape or a.shape[:1] != b.shape[1:]:
            lonely.append(f"{name} {weight.shape} with A {a.shape} and B {b.shape}")
        else:
            scale = alpha / max(a.shape[0], 1)
            plain[name] = LoraTensor(weight=weight, a=a, b=b, scale=scale)
    return plain, {"held twice": doubled, "low-rank pair without its match": lonely}


def _alpha(folder: Path) -> float:
    path = folder / "adapter_config.json"
    adapter = read_optional_json(path)
    for key in ("use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out"):
        if adapter.get(key):
            raise InputError(
                f"{path}: {key} is {adapter[key]!r}, which is not supported; merge with peft first"
            )
    alpha = adapter.get("lora_alpha", ALPHA)
    if type(alpha) not in (int, float):
        raise InputError(f"{path}: lora_alpha is {alpha!r}, expected a number; pass --lora-alpha")
    return float(alpha)
