"""A released PixelLM folder and a CLIP folder -> a checkpoint: streamed, checked, atomic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from pixellm_jax.config import CodebookConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import read_json
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import torch_config, torch_layout
from pixellm_jax.weights.checkpoint import Leaf
from pixellm_jax.weights.source import SourceFolders, constant, whole


def convert(
    model: Path,
    vision: Path,
    out: Path,
    *,
    template: str | None = None,
    position_resize: str | None = None,
    lora_alpha: float | None = None,
    progress: Callable[[int, int], None] = lambda new, total: None,
) -> ModelConfig:
    """Reads a PixelLM folder (merged, or with LoRA tensors) and a CLIP folder; writes `out`.

    `template` and `position_resize` override what the folder says, or what is usual for released
    weights. `progress` is called with the bytes just written and the bytes in all. Memory holds two
    layers of a tensor at a time.

    Raises:
        InputError: anything wrong with the folders, all tensors in one report.
    """
    folders = SourceFolders.open(model, vision, lora_alpha)
    shapes = folders.shapes
    if not torch_config.is_pixellm(shapes):
        raise InputError(
            f"{model}: no tensor of PixelLM's own parts ({', '.join(torch_config.PARTS)}); name "
            "the folder of a trained PixelLM, or start a training from a LLaVA folder with "
            "--from-llava"
        )
    _check_width(folders)
    scales = torch_config.read_scales(model, shapes)
    vocabulary = Vocabulary.load(model, scales=scales)
    codebook = CodebookConfig(tokens_per_scale=vocabulary.tokens_per_scale, scales=scales)
    config = torch_config.read_model(model, folders.vision_config, shapes, codebook, template)
    if position_resize is not None:
        seen = dataclasses.replace(config.vision, position_resize=position_resize)
        config = dataclasses.replace(config, vision=seen)
    entries = torch_layout.table(config)
    unused = {
        source: torch_layout.unused(config, source)
        for source in (torch_layout.MODEL, torch_layout.VISION)
    }
    fusion = torch_layout.released_fusion(config)
    optional = {torch_layout.FUSION[path]: value.shape for path, value in fusion.items()}
    folders.check(entries, unused, optional=optional)
    if vocabulary.size > config.language.vocabulary:
        raise InputError(
            f"{model}: the tokenizer has {vocabulary.size} ids, the embeddings have "
            f"{config.language.vocabulary} rows; is this the tokenizer of this model?"
        )
    params = {entry.path: folders.leaf(entry) for entry in entries}
    kept = {
        name: whole(tensor)
        for source, tensors in folders.tensors.items()
        for name, tensor in tensors.items()
        if name in unused[source]
        or (
            name.endswith(torch_layout.DERIVED)
            and not name.startswith(torch_layout.IGNORED[source])
        )
    }
    names = ("config.json", "generation_config.json")
    folders.write(
        out,
        config=config,
        params=params | _fusion(config, folders.tensors[torch_layout.MODEL]),
        unused=kept,
        vocabulary=vocabulary,
        source={name: read_json(model / name) for name in names if (model / name).exists()},
        progress=progress,
    )
    return config


def _check_width(folders: SourceFolders) -> None:
    """The projectors take what the vision encoder gives."""
    shapes, width = folders.shapes, folders.vision_config.width
    names = [f"model.{name}.0.weight" for name in ("mm_projector", "out_mm_projector")]
    taken = {shapes[name][-1] for name in names if shapes.get(name)}
    if len(taken) == 1 and taken != {width}:
        raise InputError(
            f"{folders.vision}: a vision encoder of width {width}, but {names[0]} of "
            f"{folders.model} takes width {taken.pop()}; give the CLIP folder that the model was "
            "trained with"
        )


def _fusion(config: ModelConfig, tensors: Mapping[str, torch_layout.Tensor]) -> dict[str, Leaf]:
    """Trained fusion weights where the folder has them, else the released constants."""
    leaves = {}
    for path, value in torch_layout.released_fusion(config).items():
        tensor = tensors.get(torch_layout.FUSION[path])
        leaves[path] = whole(tensor) if tensor else constant(value)
    return leaves
