"""Folders of PyTorch weights -> a checkpoint: streamed, checked, atomic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pixellm_jax import checkpoint, hf, hf_config
from pixellm_jax.checkpoint import Leaf
from pixellm_jax.config import CodebookConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.tensor_files import open_folder
from pixellm_jax.vocabulary import Vocabulary

LORA_PREFIX = "base_model.model."
LORA_ALPHA = 16.0
"""alpha of the released training script, where no adapter_config.json says another."""

NAMES_SHOWN = 1000
"""Of each kind of problem; a report names every tensor of any model in use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTensor:
    """W + (alpha / r) B A, read from the three tensors; float32 sum in the dtype of W."""

    weight: hf.Tensor
    a: hf.Tensor
    b: hf.Tensor
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


def convert(
    model: Path,
    vision: Path,
    out: Path,
    *,
    codebook: CodebookConfig | None = None,
    template: str | None = None,
    position_resize: str | None = None,
    lora_alpha: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda new, total: None,
) -> ModelConfig:
    """Reads a PixelLM (or LLaVA) folder and a CLIP folder; writes a checkpoint at `out`.

    A LLaVA folder has no PixelLM parts: they are drawn with `seed`, in the sizes of `codebook`, its
    tokenizer and embeddings grow by the codebook tokens, and the result is where training starts.
    `template` and `position_resize` override what the folder says, or what is usual for its kind.
    `progress` is called with the bytes just written and the bytes in all. Memory holds two layers
    of a tensor at a time.

    Raises:
        InputError: anything wrong with the folders, all tensors in one report.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: expected 0 or more; choose another")
    if lora_alpha is not None and not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise InputError(f"lora_alpha {lora_alpha}: expected a number above 0")
    vision_config = hf_config.read_vision(vision)
    merged, problems = _without_lora(model, lora_alpha)
    tensors: dict[str, Mapping[str, hf.Tensor]]
    tensors = {hf.MODEL: merged, hf.VISION: open_folder(vision)}
    shapes = {name: tensor.shape for name, tensor in tensors[hf.MODEL].items()}
    released = hf_config.is_pixellm(shapes)
    _check_width(model, shapes, vision, vision_config.width)
    if released:
        if codebook is not None:
            raise InputError(f"{model}: has its own codebook; N and L are only for LLaVA folders")
        scales = hf_config.read_scales(model, shapes)
        vocabulary = Vocabulary.load(model, scales=scales)
        codebook = CodebookConfig(tokens_per_scale=vocabulary.tokens_per_scale, scales=scales)
    else:
        codebook = codebook or CodebookConfig()
        if min(codebook.tokens_per_scale, codebook.scales) < 1:
            raise InputError(f"{codebook}: expected at least one token and one scale")
        vocabulary = Vocabulary.with_codebook(
            model, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
        )
    config = hf_config.read_model(model, vision_config, shapes, codebook, template)
    if position_resize is not None:
        seen = dataclasses.replace(config.vision, position_resize=position_resize)
        config = dataclasses.replace(config, vision=seen)
    entries = [e for e in hf.table(config) if released or _in_llava(e)]
    unused = {hf.MODEL: hf.unused(config, hf.MODEL) if released else {}}
    unused[hf.VISION] = hf.unused(config, hf.VISION)
    folders = {hf.MODEL: model, hf.VISION: vision}
    _check(config, entries, unused, tensors, folders, problems)
    if released and vocabulary.size > config.language.vocabulary:
        raise InputError(
            f"{model}: the tokenizer has {vocabulary.size} ids, the embeddings have "
            f"{config.language.vocabulary} rows; is this the tokenizer of this model?"
        )

    params = {entry.path: _leaf(entry, tensors[entry.source]) for entry in entries}
    params |= _fusion(config, tensors[hf.MODEL])
    if not released:
        config = _grow(config, vocabulary.size, params, seed)
        params |= _fresh(config, params, seed)
    kept = {
        name: _whole(tensor)
        for source in (hf.MODEL, hf.VISION)
        for name, tensor in tensors[source].items()
        if name in unused[source]
        or (released and name.endswith(hf.DERIVED) and not name.startswith(hf.IGNORED[source]))
    }
    total = sum(leaf.nbytes for leaf in [*params.values(), *kept.values()])
    progress(0, total)

    sources = {"config.json": model, "generation_config.json": model}
    checkpoint.write(
        out,
        config=config,
        params=params,
        unused=kept,
        vocabulary=vocabulary,
        source={
            **{
                name: hf_config.read_json(folder / name)
                for name, folder in sources.items()
                if released and (folder / name).exists()
            },
            "vision.json": hf_config.read_json(vision / "config.json"),
        },
        written=lambda leaf: progress(leaf.nbytes, total),
    )
    return config


def _check_width(
    model: Path, shapes: Mapping[str, tuple[int, ...]], vision: Path, width: int
) -> None:
    """The projectors, where there are any, take what the vision encoder gives."""
    names = [f"model.{name}.0.weight" for name in ("mm_projector", "out_mm_projector")]
    taken = {shapes[name][-1] for name in names if shapes.get(name)}
    if len(taken) == 1 and taken != {width}:
        raise InputError(
            f"{vision}: a vision encoder of width {width}, but {names[0]} of {model} takes width "
            f"{taken.pop()}; give the CLIP folder that the model was trained with"
        )


def _without_lora(
    model: Path, alpha: float | None
) -> tuple[dict[str, hf.Tensor], dict[str, list[str]]]:
    """The tensors of a folder with the training prefix removed and low-rank pairs merged.

    Also what is wrong with them, by kind.
    """
    found = open_folder(model)
    plain: dict[str, hf.Tensor] = {}
    pairs: dict[str, dict[str, hf.Tensor]] = {}
    doubled = []
    for full, tensor in found.items():
        name = full.removeprefix(LORA_PREFIX).replace(".base_layer.", ".")
        stem, marker, rest = name.partition(".lora_")
        if marker:
            side = rest.split(".")[0]
            target, key = pairs.setdefault(f"{stem}.weight", {}), side
        else:
            target, key = plain, name
        if key in target:
            doubled.append(name)
        target[key] = tensor
    alpha = _lora_alpha(model) if alpha is None else alpha
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


def _lora_alpha(model: Path) -> float:
    path = model / "adapter_config.json"
    if not path.exists():
        return LORA_ALPHA
    adapter = hf_config.read_json(path)
    for key in ("use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out"):
        if adapter.get(key):
            raise InputError(
                f"{path}: {key} is {adapter[key]!r}, which is not supported; merge with peft first"
            )
    alpha = adapter.get("lora_alpha", LORA_ALPHA)
    if type(alpha) not in (int, float):
        raise InputError(f"{path}: lora_alpha is {alpha!r}, expected a number; pass --lora-alpha")
    return float(alpha)


def _check(
    config: ModelConfig,
    entries: Iterable[hf.Entry],
    unused: Mapping[str, Mapping[str, tuple[int, ...]]],
    tensors: Mapping[str, Mapping[str, hf.Tensor]],
    folders: Mapping[str, Path],
    problems: Mapping[str, list[str]],
) -> None:
    """Every tensor is wanted, every wanted tensor is there in its shape, or one report says no.

    `problems`: those of the model folder that are known already, by kind.
    """
    reports = []
    fusion = hf.released_fusion(config)
    optional = {hf.FUSION[path]: value.shape for path, value in fusion.items()}
    for source, found in tensors.items():
        wanted = dict(unused[source])
        for entry in entries:
            if entry.source == source:
                wanted |= dict.fromkeys(entry.names, entry.torch)
        known = wanted | optional if source == hf.MODEL else wanted
        shapes = [
            f"{name} {tensor.shape}, expected {known[name]}"
            for name, tensor in found.items()
            if name in known and tensor.shape != known[name]
        ]
        projector = (
            ()
            if hf_config.is_pixellm({name: t.shape for name, t in found.items()})
            else ("model.mm_projector.",)
        )
        ignored = (*hf.IGNORED[source], *projector)  # of LLaVA, in whatever version
        strange = [
            name
            for name in found
            if name not in known and not name.startswith(ignored) and not name.endswith(hf.DERIVED)
        ]
        kinds = {
            **(problems if source == hf.MODEL else {}),
            "missing": [name for name in wanted if name not in found],
            "unknown": strange,
            "wrong shape": shapes,
            "no floating point numbers": [
                f"{name} {tensor.dtype}"
                for name, tensor in found.items()
                if name in known and not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
            ],
        }
        parts = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
        if parts:
            reports.append(f"{folders[source]}: {'; '.join(parts)}")
    if reports:
        raise InputError(
            f"{' | '.join(reports)} (the tensors are not those that config.json describes: "
            "download the folder again, or name the right one)"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _leaf(entry: hf.Entry, tensors: Mapping[str, hf.Tensor]) -> Leaf:
    layers = [tensors[name] for name in entry.names]
    dtypes = {layer.dtype for layer in layers}
    common = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else common

    def read(i: int) -> np.ndarray:
        return np.ascontiguousarray(entry.to_ours(layers[i].read()), dtype)

    return Leaf(shape=entry.shape, dtype=dtype, read=read, stacked=bool(entry.count))


def _fusion(config: ModelConfig, tensors: Mapping[str, hf.Tensor]) -> dict[str, Leaf]:
    """Trained fusion weights where the folder has them, else the released constants."""
    leaves = {}
    for path, value in hf.released_fusion(config).items():
        tensor = tensors.get(hf.FUSION[path])
        leaves[path] = _whole(tensor) if tensor else _constant(value)
    return leaves


def _in_llava(entry: hf.Entry) -> bool:
    return entry.source == hf.VISION or entry.path.startswith("language_model.")


def _grow(config: ModelConfig, size: int, params: dict[str, Leaf], seed: int) -> ModelConfig:
    """Brings embeddings and head to the size of the tokenizer; new rows ~ N(0, 0.02)."""
    for index, path in enumerate(("language_model.embedding", "language_model.head")):
        old = params[path]

        def read(_: int, old: Leaf = old, index: int = index) -> np.ndarray:
            rows, width = old.shape
            draw = np.random.default_rng([seed, index]).normal(0, 0.02, (size, width))
            grown = draw.astype(old.dtype)
            grown[: min(rows, size)] = old.read(0)[:size]
            return grown

        params[path] = Leaf(shape=(size, old.shape[1]), dtype=old.dtype, read=read)
    language = dataclasses.replace(config.language, vocabulary=size)
    return dataclasses.replace(config, language=language)


def _fresh(config: ModelConfig, params: Mapping[str, Leaf], seed: int) -> dict[str, Leaf]:
    """The parameters that no folder holds, drawn with `seed`; nothing else is materialised."""
    drawn = _draw(jax.random.key(seed), config, frozenset(params))
    return {name: _constant(np.asarray(array)) for name, array in drawn.items()}


@partial(jax.jit, static_argnames=("config", "held"))
def _draw(key: jax.Array, config: ModelConfig, held: frozenset[str]) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(PixelLM(key, config)))
    named = {".".join(map(str, path)): variable.get_value() for path, variable in state}
    return {name: array for name, array in named.items() if name not in held}


def _whole(tensor: hf.Tensor) -> Leaf:
    return Leaf(shape=tensor.shape, dtype=tensor.dtype, read=lambda _: tensor.read())


def _constant(array: np.ndarray) -> Leaf:
    return Leaf(shape=array.shape, dtype=array.dtype, read=lambda _: array)
