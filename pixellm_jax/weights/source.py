"""The two folders of PyTorch weights a checkpoint is made of: opened, checked, streamed out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixellm_jax.config import ModelConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import read_json
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint, lora_adapter, torch_config, torch_layout
from pixellm_jax.weights.checkpoint import Leaf
from pixellm_jax.weights.torch_folder import open_folder

NAMES_SHOWN = 1000
"""Of each kind of problem; a report names every tensor of any model in use."""


@dataclass(frozen=True, kw_only=True)
class SourceFolders:
    """A language model's folder (PixelLM or LLaVA) and a CLIP folder, their tensors still on disk.

    `vision_config`: of the CLIP folder. `tensors`: by folder (`hf.MODEL`, `hf.VISION`), then name.
    `problems`: what is wrong with the model's low-rank pairs, by kind.
    """

    model: Path
    vision: Path
    vision_config: VisionConfig
    tensors: Mapping[str, Mapping[str, torch_layout.Tensor]]
    problems: Mapping[str, list[str]]

    @classmethod
    def open(cls, model: Path, vision: Path, lora_alpha: float | None = None) -> SourceFolders:
        """Reads the headers of the files; low-rank pairs count as the weights they make.

        Raises:
            InputError: a folder or a file is missing or damaged, or not what it should be.
        """
        vision_config = torch_config.read_vision(vision)
        merged, problems = lora_adapter.open_merged(model, lora_alpha)
        return cls(
            model=model,
            vision=vision,
            vision_config=vision_config,
            tensors={torch_layout.MODEL: merged, torch_layout.VISION: open_folder(vision)},
            problems=problems,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's tensors."""
        return {name: tensor.shape for name, tensor in self.tensors[torch_layout.MODEL].items()}

    def check(
        self,
        entries: Iterable[torch_layout.Entry],
        unused: Mapping[str, Mapping[str, tuple[int, ...]]],
        *,
        optional: Mapping[str, tuple[int, ...]] | None = None,
        ignored: tuple[str, ...] = (),
    ) -> None:
        """Every tensor is wanted, every wanted tensor is there in its shape.

        `unused`: shapes of further tensors that must be there, by folder. `optional`: of those that
        the model's folder may hold. `ignored`: prefixes of what else it may hold.

        Raises:
            InputError: or one report says no, with all names.
        """
        reports = []
        for source, found in self.tensors.items():
            of_model = source == torch_layout.MODEL
            wanted = dict(unused[source])
            for entry in entries:
                if entry.source == source:
                    wanted |= dict.fromkeys(entry.names, entry.torch)
            known = wanted | dict(optional or {}) if of_model else wanted
            passed = (*torch_layout.IGNORED[source], *(ignored if of_model else ()))
            kinds = {
                **(self.problems if of_model else {}),
                "missing": [name for name in wanted if name not in found],
                "unknown": [
                    name
                    for name in found
                    if name not in known
                    and not name.startswith(passed)
                    and not name.endswith(torch_layout.DERIVED)
                ],
                "wrong shape": [
                    f"{name} {tensor.shape}, expected {known[name]}"
                    for name, tensor in found.items()
                    if name in known and tensor.shape != known[name]
                ],
                "no floating point numbers": [
                    f"{name} {tensor.dtype}"
                    for name, tensor in found.items()
                    if name in known and not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
                ],
            }
            parts = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
            if parts:
                folder = self.model if of_model else self.vision
                reports.append(f"{folder}: {'; '.join(parts)}")
        if reports:
            raise InputError(
                f"{' | '.join(reports)} (the tensors are not those that config.json describes: "
                "download the folder again, or name the right one)"
            )

    def leaf(self, entry: torch_layout.Entry) -> Leaf:
        """One of our parameters, to be read layer by layer."""
        layers = [self.tensors[entry.source][name] for name in entry.names]
        dtypes = {layer.dtype for layer in layers}
        common = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
        dtype = dtypes.pop() if len(dtypes) == 1 else common

        def read(i: int) -> np.ndarray:
            return np.ascontiguousarray(entry.to_ours(layers[i].read()), dtype)

        return Leaf(shape=entry.shape, dtype=dtype, read=read, stacked=bool(entry.count))

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
        """Writes the checkpoint; `progress` gets the bytes just written and the bytes in all.

        `source`: configs of the model's folder to keep; that of the CLIP folder is kept anyway.
        """
        total = sum(leaf.nbytes for leaf in [*params.values(), *unused.values()])
        progress(0, total)
        checkpoint.write(
            out,
            config=config,
            params=params,
            unused=unused,
            vocabulary=vocabulary,
            source={**source, "vision.json": read_json(self.vision / "config.json")},
            written=lambda leaf: progress(leaf.nbytes, total),
        )


def whole(tensor: torch_layout.Tensor) -> Leaf:
    """A tensor as it is in its file."""
    return Leaf(shape=tensor.shape, dtype=tensor.dtype, read=lambda _: tensor.read())


def constant(array: np.ndarray) -> Leaf:
    """An array that is in memory."""
    return Leaf(shape=array.shape, dtype=array.dtype, read=lambda _: array)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
