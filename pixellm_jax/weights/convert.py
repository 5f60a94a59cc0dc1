"""Conversion of a released PixelLM folder and a CLIP folder to a checkpoint, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pixellm_jax.config import CodebookConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import read_json
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import torch_config, torch_layout
from pixellm_jax.weights.source import SourceFolders, as_stored, in_memory
from pixellm_jax.weights.writer import Leaf

GENERATION_CONFIG = "generation_config.json"


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
    """Convert a PixelLM folder (merged, or with LoRA tensors) and a CLIP folder.

    Memory holds at most two layers of a tensor at a time.

    Args:
        model: PixelLM folder in the released PyTorch layout.
        vision: CLIP folder.
        out: new checkpoint folder.
        template: conversation template, instead of the folder's.
        position_resize: form of the position table, instead of the folder's.
        lora_alpha: scale of LoRA tensors, instead of adapter_config.json.
        progress: called with the bytes just written and the total.

    Raises:
        InputError: anything wrong with the folders; all wrong tensors are in one report.
    """
    folders = SourceFolders.open(model, vision, lora_alpha)
    shapes = folders.shapes
    if not torch_config.is_pixellm(shapes):
        raise InputError(
            f"{model}: no tensor of PixelLM's own parts ({', '.join(torch_config.PARTS)}); give "
            "the folder of a trained PixelLM, or start a training from a LLaVA folder with "
            "--from-llava"
        )
    _check_width(folders)
    scales = torch_config.count_scales(folders.model_json, shapes)
    vocabulary = Vocabulary.load(model, scales=scales)
    codebook = CodebookConfig(tokens_per_scale=vocabulary.tokens_per_scale, scales=scales)
    config = torch_config.pixellm_config(
        folders.model_json,
        folders.vision_config,
        shapes,
        codebook,
        template=template,
        position_resize=position_resize,
    )
    entries = torch_layout.table(config)
    folders.check(entries)
    if vocabulary.size > config.language.vocabulary:
        raise InputError(
            f"{model}: the tokenizer has {vocabulary.size} ids, the embeddings have "
            f"{config.language.vocabulary} rows; is this the tokenizer of this model?"
        )
    source = {"config.json": folders.model_json.values}
    if (model / GENERATION_CONFIG).exists():
        source[GENERATION_CONFIG] = read_json(model / GENERATION_CONFIG)
    folders.write(
        out,
        config=config,
        params=folders.params(entries) | _fusion(config, folders),
        unused=folders.unused(entries) | folders.derived(),
        vocabulary=vocabulary,
        source=source,
        progress=progress,
    )
    return config


def _check_width(folders: SourceFolders) -> None:
    """Check that the projectors take the width of the vision encoder."""
    shapes, width = folders.shapes, folders.vision_config.width
    names = [f"model.{name}.0.weight" for name in ("mm_projector", "out_mm_projector")]
    widths = {shapes[name][-1] for name in names if shapes.get(name)}
    if len(widths) == 1 and widths != {width}:
        raise InputError(
            f"{folders.vision}: a vision encoder of width {width}, but {names[0]} of "
            f"{folders.model} takes width {widths.pop()}; give the CLIP folder that the model was "
            "trained with"
        )


def _fusion(config: ModelConfig, folders: SourceFolders) -> dict[str, Leaf]:
    """Return the trained fusion weights where the folder has them, else the released constants."""
    constants = torch_layout.released_fusion(config)
    leaves = {}
    for entry in torch_layout.table(config, kind="optional"):
        tensor = folders.tensors[entry.source].get(entry.name)
        leaves[entry.path] = as_stored(tensor) if tensor else in_memory(constants[entry.path])
    return leaves
