"""Folders of PyTorch weights -> a checkpoint: streamed, checked, atomic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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

NAMES_SHOWN = 40


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
    template: str = "llava_v1",
    lora_alpha: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda new, total: None,
) -> ModelConfig:
    """Reads a PixelLM (or LLaVA) folder and a CLIP folder; writes a checkpoint at `out`.

    A LLaVA folder has no PixelLM parts: they are drawn with `seed`, in the sizes of `codebook`, its
    tokenizer and embeddings grow by the codebook tokens, and the result is where training starts.
    `progress` is called with the bytes just written and the bytes in all. Memory holds two layers
    of a tensor at a time.

    Raises:
        InputError: anything wrong with the folders, all tensors in one report.
    """
    vision_config = hf_config.read_vision(vision)
    tensors: dict[str, Mapping[str, hf.Tensor]]
    tensors = {hf.MODEL: _without_lora(model, lora_alpha), hf.VISION: open_folder(vision)}
    shapes = {name: tensor.shape for name, tensor in tensors[hf.MODEL].items()}
    released = hf_config.is_pixellm(shapes)
    if released:
        if codebook is not None:
            raise InputError(f"{model}: has its own codebook; N and L are only for LLaVA folders")
        scales = hf_config.read_scales(model, shapes)
        vocabulary = Vocabulary.load(model, scales=scales)
        codebook = CodebookConfig(tokens_per_scale=vocabulary.tokens_per_scale, scales=scales)
    else:
        codebook = codebook or CodebookConfig()
        vocabulary = Vocabulary.with_codebook(
            model, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
        )
    config = hf_config.read_model(model, vision_config, shapes, codebook, template)
    entries = [e for e in hf.table(config) if released or _in_llava(e)]
    unused = {hf.MODEL: hf.unused(config, hf.MODEL) if released else {}}
    unused[hf.VISION] = hf.unused(config, hf.VISION)
    _check(config, entries, unused, tensors, {hf.MODEL: model, hf.VISION: vision})
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
        if name in unused[source] or (released and name.endswith(hf.DERIVED))
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


def _without_lora(model: Path, alpha: float | None) -> dict[str, hf.Tensor]:
    """The tensors of a folder with the training prefix removed and low-rank pairs merged."""
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
    if alpha is None:
        adapter = model / "adapter_config.json"
        alpha = LORA_ALPHA
        if adapter.exists():
            alpha = float(hf_config.read_json(adapter).get("lora_alpha", LORA_ALPHA))
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
    _report(model, {"held twice": doubled, "low-rank pair without its match": lonely})
    return plain


def _check(
    config: ModelConfig,
    entries: Iterable[hf.Entry],
    unused: Mapping[str, Mapping[str, tuple[int, ...]]],
    tensors: Mapping[str, Mapping[str, hf.Tensor]],
    folders: Mapping[str, Path],
) -> None:
    """Every tensor is wanted, every wanted tensor is there in its shape, or one report says no."""
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
        strange = [
            name
            for name in found
            if name not in known
            and not name.startswith(hf.IGNORED[source])
            and not name.endswith(hf.DERIVED)
        ]
        _report(
            folders[source],
            {
                "missing": [name for name in wanted if name not in found],
                "unknown": strange,
                "wrong shape": shapes,
            },
        )


def _report(folder: Path, problems: Mapping[str, list[str]]) -> None:
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            parts.append(f"{kind}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if parts:
        raise InputError(
            f"{folder}: the tensors are not those its config.json describes ({'; '.join(parts)}); "
            f"download the folder again, or name the right one"
        )


def _leaf(entry: hf.Entry, tensors: Mapping[str, hf.Tensor]) -> Leaf:
    layers = [tensors[name] for name in entry.names]
    dtype = layers[0].dtype
    for layer in layers[1:]:
        dtype = np.promote_types(dtype, layer.dtype)

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

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        state = nnx.to_flat_state(nnx.state(PixelLM(key, config)))
        named = {".".join(map(str, path)): variable.get_value() for path, variable in state}
        return {name: array for name, array in named.items() if name not in params}

    arrays = {name: np.asarray(a) for name, a in jax.jit(draw)(jax.random.key(seed)).items()}
    return {name: _constant(array) for name, array in arrays.items()}


def _whole(tensor: hf.Tensor) -> Leaf:
    return Leaf(shape=tensor.shape, dtype=tensor.dtype, read=lambda _: tensor.read())


def _constant(array: np.ndarray) -> Leaf:
    return Leaf(shape=array.shape, dtype=array.dtype, read=lambda _: array)
