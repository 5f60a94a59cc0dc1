"""Source folders of a conversion: open PyTorch weights, merge LoRA pairs, check and stream them.

A checkpoint is converted from two folders: a language model (PixelLM or LLaVA) and a CLIP encoder.
Only headers are read at first; each tensor is read, and merged with its LoRA pair, when the
checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixellm_jax.config import ModelConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import read_optional_json
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import torch_config, torch_layout
from pixellm_jax.weights.tensor_view import Tensor
from pixellm_jax.weights.torch_config import ConfigFile
from pixellm_jax.weights.torch_folder import open_folder
from pixellm_jax.weights.writer import Leaf, write_checkpoint

MAX_NAMES = 1000
"""Maximum number of names listed per kind of problem; no model in use has more tensors."""

PREFIX = "base_model.model."
"""Prefix that peft and PixelLM's training script put before tensor names."""

DEFAULT_ALPHA = 16.0
"""LoRA alpha of the released training script, used unless adapter_config.json has another."""


@dataclass(frozen=True, kw_only=True)
class SourceFolders:
    """A language model's folder (PixelLM or LLaVA) and a CLIP folder, opened but not loaded."""

    model: Path
    vision: Path
    model_json: ConfigFile
    """`config.json` of the language model."""
    vision_json: ConfigFile
    """`config.json` of CLIP."""
    vision_config: VisionConfig
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By folder (`torch_layout.MODEL`, `torch_layout.VISION`), then by name."""
    merge_problems: Mapping[str, list[str]]
    """Duplicate tensors and unusable LoRA pairs of the language model, by kind of problem."""

    @classmethod
    def open(cls, model: Path, vision: Path, lora_alpha: float | None = None) -> SourceFolders:
        """Read both configs and the headers of all files.

        A weight with a LoRA pair is opened as the merged weight; `lora_alpha` overrides the value
        of adapter_config.json.

        Raises:
            InputError: a folder or file is missing, damaged or of the wrong kind.
        """
        vision_json = ConfigFile.read(vision)
        vision_config = torch_config.vision_config(vision_json)
        merged, problems = open_merged(model, lora_alpha)
        return cls(
            model=model,
            vision=vision,
            model_json=ConfigFile.read(model),
            vision_json=vision_json,
            vision_config=vision_config,
            tensors={torch_layout.MODEL: merged, torch_layout.VISION: open_folder(vision)},
            merge_problems=problems,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the language model's tensors."""
        return {name: tensor.shape for name, tensor in self.tensors[torch_layout.MODEL].items()}

    def check(
        self, entries: Iterable[torch_layout.Entry], *, ignored: tuple[str, ...] = ()
    ) -> None:
        """Check that both folders hold the tensors of `entries` and no unknown ones.

        Optional tensors may be missing. Buffers that follow from the config and the tensors that
        `torch_layout.IGNORED` lists may be there.

        Args:
            entries: rows of the tensor table.
            ignored: prefixes of further tensors that the language model's folder may hold.

        Raises:
            InputError: one report of all tensors that are missing, unknown, duplicate, of the
                wrong shape or dtype, and of unusable LoRA pairs.
        """
        entries = list(entries)
        reports = []
        for source, folder in (
            (torch_layout.MODEL, self.model),
            (torch_layout.VISION, self.vision),
        ):
            rows = [entry for entry in entries if entry.source == source]
            problems = self._problems(source, rows, ignored)
            parts = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
            if parts:
                reports.append(f"{folder}: {'; '.join(parts)}")
        if reports:
            raise InputError(
                f"{' | '.join(reports)} (these are not the tensors that config.json describes: "
                "download the folder again, or choose the right one)"
            )

    def _problems(
        self, source: str, rows: list[torch_layout.Entry], ignored: tuple[str, ...]
    ) -> dict[str, list[str]]:
        """Return descriptions of the wrong tensors of one folder, by kind of problem."""
        tensors = self.tensors[source]
        expected = {name: row.torch for row in rows for name in row.names}
        required = [name for row in rows if row.kind != "optional" for name in row.names]
        ignored_prefixes = torch_layout.IGNORED[source]
        problems: dict[str, list[str]] = {}
        if source == torch_layout.MODEL:
            ignored_prefixes = (*ignored_prefixes, *ignored)
            problems |= self.merge_problems
        problems["missing"] = [name for name in required if name not in tensors]
        problems["unknown"] = [
            name
            for name in tensors
            if name not in expected
            and not name.startswith(ignored_prefixes)
            and not name.endswith(torch_layout.DERIVED)
        ]
        known = {name: tensor for name, tensor in tensors.items() if name in expected}
        problems["wrong shape"] = [
            f"{name} {tensor.shape}, expected {expected[name]}"
            for name, tensor in known.items()
            if tensor.shape != expected[name]
        ]
        problems["no floating point numbers"] = [
            f"{name} {tensor.dtype}"
            for name, tensor in known.items()
            if not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
        ]
        return problems

    def params(self, entries: Iterable[torch_layout.Entry]) -> dict[str, Leaf]:
        """Return the required parameters among `entries`, to be read layer by layer."""
        return {entry.path: self._leaf(entry) for entry in entries if entry.kind == "required"}

    def unused(self, entries: Iterable[torch_layout.Entry]) -> dict[str, Leaf]:
        """Return the unused tensors among `entries`, as they are in their files."""
        return {
            entry.name: as_stored(self.tensors[entry.source][entry.name])
            for entry in entries
            if entry.kind == "unused"
        }

    def derived(self) -> dict[str, Leaf]:
        """Return the buffers of both folders that can be recomputed from the config."""
        return {
            name: as_stored(tensor)
            for source, tensors in self.tensors.items()
            for name, tensor in tensors.items()
            if name.endswith(torch_layout.DERIVED)
            and not name.startswith(torch_layout.IGNORED[source])
        }

    def write(
        self,
        out: Path,
        *,
        config: ModelConfig,
        params: Mapping[str, Leaf],
        unused: Mapping[str, Leaf],
        vocabulary: Vocabulary,
        source: Mapping[str, Mapping[str, Any]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Write the checkpoint.

        Args:
            out: a new folder.
            config: model configuration.
            params: parameters by dotted name.
            unused: further tensors to keep for export.
            vocabulary: the tokenizer.
            source: JSON files of the language model's folder to keep for export, by name; the
                config of CLIP is always kept.
            progress: called with the bytes just written and the total, first with (0, total).

        Raises:
            InputError: `out` exists or cannot be written.
        """
        total = sum(leaf.nbytes for leaf in [*params.values(), *unused.values()])
        progress(0, total)
        write_checkpoint(
            out,
            config=config,
            params=params,
            unused=unused,
            vocabulary=vocabulary,
            source={**source, "vision.json": self.vision_json.values},
            on_written=lambda leaf: progress(leaf.nbytes, total),
        )

    def _leaf(self, entry: torch_layout.Entry) -> Leaf:
        layers = [self.tensors[entry.source][name] for name in entry.names]
        dtypes = {layer.dtype for layer in layers}
        if len(dtypes) == 1:
            (dtype,) = dtypes
        else:  # a dtype that holds the values of every layer
            dtype = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)

        def read(i: int) -> np.ndarray:
            return np.ascontiguousarray(entry.to_ours(layers[i].read()), dtype)

        return Leaf(shape=entry.shape, dtype=dtype, read=read, stacked=bool(entry.count))


def as_stored(tensor: Tensor) -> Leaf:
    """Wrap a tensor as a leaf that is read, unchanged, when the checkpoint is written."""
    return Leaf(shape=tensor.shape, dtype=tensor.dtype, read=lambda _: tensor.read())


def in_memory(array: np.ndarray) -> Leaf:
    """Wrap an array in memory as a leaf."""
    return Leaf(shape=array.shape, dtype=array.dtype, read=lambda _: array)


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """A weight merged with its LoRA pair: W + (alpha / r) B A, computed in float32."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    """alpha / r."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        return self.weight.dtype

    def read(self) -> np.ndarray:
        """Read the three tensors and return the merged weight, in the dtype of W."""
        weight, a, b = (t.read().astype(np.float32) for t in (self.weight, self.a, self.b))
        return (weight + self.scale * (b @ a)).astype(self.dtype)


def open_merged(
    folder: Path, alpha: float | None = None
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Open a folder with the training prefix removed and LoRA pairs merged.

    Returns the tensors by name, and descriptions of duplicate tensors and unusable LoRA pairs by
    kind of problem. `alpha` overrides `lora_alpha` of adapter_config.json.

    Raises:
        InputError: a file or adapter_config.json is unusable, or `alpha` is no positive number.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"lora_alpha {alpha}: expected a number above 0")
    plain: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    duplicates = []
    for full_name, tensor in open_folder(folder).items():
        name = full_name.removeprefix(PREFIX).replace(".base_layer.", ".")
        stem, marker, rest = name.partition(".lora_")
        if marker:
            group = pairs.setdefault(f"{stem}.weight", {})
            key = rest.split(".")[0]  # "A" or "B" of a matrix, "embedding_A" of an embedding
        else:
            group = plain
            key = name
        if key in group:
            duplicates.append(name)
        group[key] = tensor
    alpha = _read_alpha(folder, alpha)
    unmatched = []
    for name, pair in pairs.items():
        weight, a, b = plain.get(name), pair.get("A"), pair.get("B")
        if weight is None or a is None or b is None or len(pair) != 2:
            unmatched.append(name)
        elif not _fits(weight.shape, a.shape, b.shape):
            unmatched.append(f"{name} {weight.shape} with A {a.shape} and B {b.shape}")
        else:
            scale = alpha / max(a.shape[0], 1)
            plain[name] = MergedTensor(weight=weight, a=a, b=b, scale=scale)
    return plain, {"held twice": duplicates, "low-rank pair without its match": unmatched}


def _fits(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether W [o, i], A [r, i] and B [o, r] have matching sizes."""
    return (*b[:1], *a[1:]) == weight and a[:1] == b[1:]


def _read_alpha(folder: Path, override: float | None) -> float:
    """Return LoRA's alpha, and refuse adapters that are not merged as W + (alpha / r) B A."""
    path = folder / "adapter_config.json"
    adapter = read_optional_json(path)
    for key in ("use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out"):
        if adapter.get(key):
            raise InputError(
                f"{path}: {key} is {adapter[key]!r}, which is not supported; merge the "
                "adapter with peft first"
            )
    if override is not None:
        return override
    alpha = adapter.get("lora_alpha", DEFAULT_ALPHA)
    if type(alpha) not in (int, float):
        raise InputError(f"{path}: lora_alpha is {alpha!r}, expected a number; pass --lora-alpha")
    return float(alpha)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
