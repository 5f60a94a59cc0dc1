"""`config.json` of a PixelLM, LLaVA or CLIP folder <-> `ModelConfig`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixellm_jax.config import (
    DEFAULT_TAPS,
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    from_mapping,
)
from pixellm_jax.errors import InputError

OWN_KEY = "pixellm_jax"
"""Key of an exported `config.json` for what the released format cannot say (taps, heads, ...)."""

LANGUAGE_TYPES = ("llava", "llama", "llava_llama")
DTYPES = {"float32": "float32", "float16": "bfloat16", "bfloat16": "bfloat16"}

Shapes = Mapping[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is not there, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_vision(folder: Path) -> VisionConfig:
    """The vision encoder of a CLIP folder (the whole CLIP or its vision side alone)."""
    path = folder / "config.json"
    raw = read_json(path)
    values = raw.get("vision_config", raw) if raw.get("model_type") == "clip" else raw
    kind = values.get("model_type", raw.get("model_type"))
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"{path}: unknown model type {kind!r}; expected a CLIP vision encoder")
    _require_value(path, values, "hidden_act", "quick_gelu", default="quick_gelu")
    image, patch = _int(path, values, "image_size", 224), _int(path, values, "patch_size", 32)
    return VisionConfig(
        width=_int(path, values, "hidden_size", 768),
        layers=(layers := _int(path, values, "num_hidden_layers", 12)),
        heads=_int(path, values, "num_attention_heads", 12),
        mlp=_int(path, values, "intermediate_size", 3072),
        patch=patch,
        canvas=image // patch * patch,
        table=image // patch,
        taps=(max(DEFAULT_TAPS[0], -1 - layers),),
        eps=_float(path, values, "layer_norm_eps", 1e-5),
    )


def is_pixellm(shapes: Shapes) -> bool:
    """Whether a folder's tensors include PixelLM's own parts (a LLaVA folder has none)."""
    return any(name.startswith("model.mask_decoder.") for name in shapes)


def read_scales(folder: Path, shapes: Shapes) -> int:
    """The number of feature scales L of a PixelLM folder: the rows of the level embedding."""
    return _matrix(folder, shapes, "level_embed.weight")[0]


def read_model(
    folder: Path,
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    template: str = "llava_v1",
) -> ModelConfig:
    """The model of a PixelLM or LLaVA folder.

    The decoder's widths follow from the shapes of its tensors; N and L come with `codebook`, for
    the released config.json does not keep them (reference.md 6.3). A model that starts from a LLaVA
    folder gets the correct form of the position table, a released one the form it was trained with.

    Raises:
        InputError: an unknown model type, an unsupported option, contradictory sizes.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if own := raw.get(OWN_KEY):
        return from_mapping(ModelConfig, own, f"{path}: {OWN_KEY}")
    kind = raw.get("model_type")
    if kind not in LANGUAGE_TYPES:
        raise InputError(
            f"{path}: unknown model type {kind!r}; expected a PixelLM or LLaVA folder "
            f"(model_type one of {', '.join(LANGUAGE_TYPES)})"
        )
    if not raw.get("pad_train_clip_images", True):
        raise InputError(
            f"{path}: pad_train_clip_images is false (centre-cropped images), which is not "
            f"supported: the released PixelLM pads"
        )
    if codebook.scales > len(DEFAULT_TAPS):
        raise InputError(
            f"{path}: {codebook.scales} scales need a {OWN_KEY!r} key that names their taps"
        )
    released = is_pixellm(shapes)
    first = _int(path, raw, "mm_vision_select_layer", DEFAULT_TAPS[0])
    return ModelConfig(
        vision=dataclasses.replace(
            vision,
            canvas=_int(path, raw, "resize_vision_tower_size", 448),
            taps=(first, *DEFAULT_TAPS[1 : codebook.scales]),
            position_resize="released" if released else "correct",
        ),
        language=_language(path, raw, shapes),
        codebook=codebook,
        decoder=_decoder(folder, shapes) if released else DecoderConfig(),
        template=template,
        dtype=DTYPES.get(str(raw.get("torch_dtype") or raw.get("dtype")), "bfloat16"),
    )


def _language(path: Path, raw: dict[str, Any], shapes: Shapes) -> LanguageConfig:
    _require_value(path, raw, "hidden_act", "silu", default="silu")
    _require_value(path, raw, "rope_scaling", None, default=None)
    _require_value(path, raw, "tie_word_embeddings", False, default=False)
    heads = _int(path, raw, "num_attention_heads")
    width = _int(path, raw, "hidden_size")
    rope = raw.get("rope_parameters") or {}
    embedding = shapes.get("model.embed_tokens.weight")
    return LanguageConfig(
        vocabulary=embedding[0] if embedding else _int(path, raw, "vocab_size"),
        width=width,
        layers=_int(path, raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_int(path, raw, "num_key_value_heads", heads),
        head=_int(path, raw, "head_dim", width // heads),
        mlp=_int(path, raw, "intermediate_size"),
        rope_theta=_float(path, {**rope, **raw}, "rope_theta", 10000.0),
        eps=_float(path, raw, "rms_norm_eps", 1e-6),
        max_positions=_int(path, raw, "max_position_embeddings", 2048),
    )


def _decoder(folder: Path, shapes: Shapes) -> DecoderConfig:
    """Sizes of the pixel decoder, from the shapes of its tensors."""
    first = "model.mask_decoder.transformer.0.layers."
    depth = {name[len(first) :].split(".")[0] for name in shapes if name.startswith(first)}
    return DecoderConfig(
        width=_matrix(folder, shapes, "level_embed.weight")[1],
        mlp=_matrix(folder, shapes, "transformer.0.layers.0.mlp.lin1.weight")[0],
        depth=len(depth),
        mask_tokens=_matrix(folder, shapes, "mask_tokens.weight")[0],
    )


def _matrix(folder: Path, shapes: Shapes, name: str) -> tuple[int, int]:
    name = f"model.mask_decoder.{name}"
    found = shapes.get(name)
    if found is None or len(found) != 2:
        what = "is missing" if found is None else f"has shape {found}, expected a matrix"
        raise InputError(f"{folder}: tensor {name} {what}; download the model again")
    return found[0], found[1]


def hf_model(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` for a model that was not imported, with the keys of reference.md 6.3."""
    language, codebook = config.language, config.codebook
    return {
        "architectures": ["PixelLMForCausalLM"],
        "model_type": "llava",
        "vocab_size": language.vocabulary,
        "hidden_size": language.width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head,
        "intermediate_size": language.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": language.eps,
        "rope_theta": language.rope_theta,
        "max_position_embeddings": language.max_positions,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": config.vision.taps[0],
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": True,
        "out_dim": config.decoder.width,
        "image_feature_scale_num": codebook.scales,
        "pad_train_clip_images": True,
        "resize_vision_tower": True,
        "resize_vision_tower_size": config.vision.canvas,
        "vision_tower_for_mask": True,
        "separate_mm_projector": True,
        "train_mask_decoder": True,
        OWN_KEY: dataclasses.asdict(config),
    }


def hf_vision(config: VisionConfig) -> dict[str, Any]:
    """A `config.json` for the CLIP folder of a model that was not imported."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "image_size": config.table * config.patch,
        "patch_size": config.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": config.eps,
    }


def _int(path: Path, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key, default)
    if value is None and default is not None:
        value = default
    if type(value) is not int:
        raise InputError(f"{path}: {key} is {value!r}, expected a whole number")
    return value


def _float(path: Path, raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    value = default if value is None else value
    if type(value) not in (int, float):
        raise InputError(f"{path}: {key} is {value!r}, expected a number")
    return float(value)


def _require_value(path: Path, raw: Mapping[str, Any], key: str, wanted: Any, default: Any) -> None:
    found = raw.get(key, default)
    if found != wanted:
        raise InputError(f"{path}: {key} is {found!r}; only {wanted!r} is supported")
