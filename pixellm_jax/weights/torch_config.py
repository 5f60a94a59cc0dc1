"""`config.json` of a PixelLM, LLaVA or CLIP folder <-> `ModelConfig`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from pixellm_jax.files import read_json

OWN_KEY = "pixellm_jax"
"""Key of an exported `config.json` for what the released format cannot say (taps, heads, ...)."""

PARTS = ("mask_decoder", "prompt_encoder", "text_hidden_fcs", "out_mm_projector")
"""What a PixelLM folder has and a LLaVA folder has not: `model.PART...`."""

LANGUAGE_TYPES = ("llava", "llama", "llava_llama")
DTYPES = {"float32": "float32", "float16": "bfloat16", "bfloat16": "bfloat16"}

Shapes = Mapping[str, tuple[int, ...]]


def read_vision(folder: Path) -> VisionConfig:
    """The vision encoder of a CLIP folder (the whole CLIP or its vision side alone)."""
    path = folder / "config.json"
    raw = read_json(path)
    values = raw.get("vision_config", raw) if raw.get("model_type") == "clip" else raw
    if not isinstance(values, dict):
        raise InputError(f"{path}: vision_config is {values!r}, expected an object")
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
    return any(name.startswith(tuple(f"model.{part}." for part in PARTS)) for name in shapes)


def read_scales(folder: Path, shapes: Shapes) -> int:
    """The number of feature scales L of a PixelLM folder.

    The transformers, the level embedding and `config.json` say it: most of them are right.
    """
    said = read_json(folder / "config.json").get("image_feature_scale_num")
    votes = [_consecutive(shapes, "model.mask_decoder.transformer."), said]
    votes += _sizes(shapes, r"mask_decoder\.level_embed\.weight", 0)
    return _agreed((vote for vote in votes if type(vote) is int), 1)


def read_model(
    folder: Path,
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    template: str | None = None,
) -> ModelConfig:
    """The model of a PixelLM folder.

    The decoder's widths follow from the shapes of its tensors; N and L come with `codebook`, for
    the released config.json does not keep them (docs/reference_notes.md 6.3). The position table
    has the form that the released models were trained with. `template` overrides what an
    exported folder says, and is "llava_v1" where nothing says it.

    Raises:
        InputError: an unknown model type, an unsupported option, contradictory sizes.
    """
    path = folder / "config.json"
    raw = read_json(path)
    with _naming(path):
        return _read_model(path, raw, vision, shapes, codebook, template)


def _read_model(
    path: Path,
    raw: dict[str, Any],
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    template: str | None,
) -> ModelConfig:
    if (own := raw.get(OWN_KEY)) is not None:
        if not isinstance(own, dict):
            raise InputError(f"{OWN_KEY} is {own!r}, expected an object")
        config = from_mapping(ModelConfig, own, OWN_KEY)
        return dataclasses.replace(config, template=template or config.template)
    _require_type(raw)
    if not raw.get("pad_train_clip_images", True):
        raise InputError(
            "pad_train_clip_images is false (centre-cropped images), which is not supported: the "
            "released PixelLM pads"
        )
    _require_value(path, raw, "mm_vision_select_feature", "patch", default="patch")
    _require_value(path, raw, "mm_use_im_start_end", True, default=True)
    _require_value(path, raw, "separate_mm_projector", True, default=True)
    if codebook.scales > len(DEFAULT_TAPS):
        raise InputError(f"{codebook.scales} scales need a {OWN_KEY!r} key that names their taps")
    first = _int(path, raw, "mm_vision_select_layer", DEFAULT_TAPS[0], least=-1000)
    return ModelConfig(
        vision=dataclasses.replace(
            vision,
            canvas=_int(path, raw, "resize_vision_tower_size", VisionConfig.canvas),
            taps=(first, *DEFAULT_TAPS[1 : codebook.scales]),
            position_resize="released",
        ),
        language=_language(path, raw, shapes),
        codebook=codebook,
        decoder=_decoder(shapes),
        template=template or "llava_v1",
        dtype=_dtype(raw),
    )


def read_start(
    folder: Path,
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    canvas: int = VisionConfig.canvas,
) -> ModelConfig:
    """The model that a training builds around the language model of a LLaVA folder.

    What LLaVA has no word for is as in the paper: the taps, the pixel decoder, the template. The
    position table has the correct form.

    Raises:
        InputError: an unknown model type, an unsupported option, contradictory sizes.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if min(codebook.tokens_per_scale, codebook.scales) < 1:
        raise InputError(f"{codebook}: expected at least one token and one scale")
    if codebook.scales > len(DEFAULT_TAPS):
        raise InputError(f"{codebook.scales} scales: expected at most {len(DEFAULT_TAPS)}")
    if canvas < 1 or canvas % vision.patch:
        raise InputError(
            f"canvas of {canvas} pixels: expected a multiple of {vision.patch}, the patch of the "
            "vision encoder"
        )
    with _naming(path):
        _require_type(raw)
        return ModelConfig(
            vision=dataclasses.replace(
                vision,
                canvas=canvas,
                taps=DEFAULT_TAPS[: codebook.scales],
                position_resize="correct",
            ),
            language=_language(path, raw, shapes),
            codebook=codebook,
            dtype=_dtype(raw),
        )


def read_initializer_range(folder: Path) -> float:
    """Standard deviation with which transformers draws new rows of this folder's embeddings."""
    path = folder / "config.json"
    return _float(path, read_json(path), "initializer_range", 0.02)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name of the file in front of errors that do not have it."""
    try:
        yield
    except InputError as error:
        line = str(error)
        raise InputError(line if str(path) in line else f"{path}: {line}") from None


def _require_type(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in LANGUAGE_TYPES:
        raise InputError(
            f"unknown model type {kind!r}; expected a PixelLM or LLaVA folder (model_type one of "
            f"{', '.join(LANGUAGE_TYPES)})"
        )


def _dtype(raw: Mapping[str, Any]) -> str:
    return DTYPES.get(str(raw.get("torch_dtype") or raw.get("dtype")), "bfloat16")


def _language(path: Path, raw: dict[str, Any], shapes: Shapes) -> LanguageConfig:
    _require_value(path, raw, "hidden_act", "silu", default="silu")
    _require_value(path, raw, "rope_scaling", None, default=None)
    _require_value(path, raw, "tie_word_embeddings", False, default=False)
    heads = _int(path, raw, "num_attention_heads")
    width = _int(path, raw, "hidden_size")
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters is {rope!r}, expected an object")
    _require_value(path, rope, "rope_type", "default", default="default")
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


def _decoder(shapes: Shapes) -> DecoderConfig:
    """Sizes of the pixel decoder, from the shapes of its tensors."""
    default = DecoderConfig()
    head = "model.mask_decoder.transformer"
    depths = (_consecutive(shapes, f"{head}.{scale}.layers.") for scale in range(len(DEFAULT_TAPS)))
    mlp = r"mask_decoder\.transformer\.\d+\.layers\.\d+\.mlp\.lin1\.(weight|bias)"
    width = r"(mask_decoder\.(level_embed|mask_tokens|iou_token)|image_feature_neck\.[13])\.weight"
    tokens = r"mask_decoder\.(mask_tokens\.weight|iou_prediction_head\.layers\.2\.(weight|bias))"
    return DecoderConfig(
        width=_agreed(_sizes(shapes, width, -1), default.width),
        mlp=_agreed(_sizes(shapes, mlp, 0), default.mlp),
        depth=_agreed(depths, default.depth),
        mask_tokens=_agreed(_sizes(shapes, tokens, 0), default.mask_tokens),
    )


def _agreed(votes: Iterable[int], default: int) -> int:
    """What most tensors say, so that a bad one is found out and not believed."""
    counts = Counter(vote for vote in votes if vote > 0)
    return counts.most_common(1)[0][0] if counts else default


def _sizes(shapes: Shapes, pattern: str, axis: int) -> list[int]:
    wanted = re.compile(rf"model\.{pattern}")
    return [shape[axis] for name, shape in shapes.items() if shape and wanted.fullmatch(name)]


def _consecutive(shapes: Shapes, prefix: str) -> int:
    """How many of `PREFIX0.`, `PREFIX1.`, ... there are, up to the first gap."""
    found = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    return next(i for i in itertools.count() if str(i) not in found)


def hf_model(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` for a model that was not imported (keys: docs/reference_notes.md 6.3)."""
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


def _int(
    path: Path, raw: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1
) -> int:
    value = raw.get(key, default)
    if value is None and default is not None:
        value = default
    if type(value) is not int or value < least:
        raise InputError(
            f"{path}: {key} is {value!r}, expected a whole number from {least}; download it again"
        )
    return value


def _float(path: Path, raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    value = default if value is None else value
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise InputError(
            f"{path}: {key} is {value!r}, expected a positive number; download it again"
        )
    return float(value)


def _require_value(path: Path, raw: Mapping[str, Any], key: str, wanted: Any, default: Any) -> None:
    found = raw.get(key, default)
    if found != wanted:
        raise InputError(f"{path}: {key} is {found!r}; only {wanted!r} is supported")
