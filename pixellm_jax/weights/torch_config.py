"""Translation between Hugging Face's `config.json` (PixelLM, LLaVA or CLIP) and `ModelConfig`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
"""Key of an exported `config.json` for what the released format cannot express, e.g. the taps."""

PARTS = ("mask_decoder", "prompt_encoder", "text_hidden_fcs", "out_mm_projector")
"""Modules (`model.PART...`) that a PixelLM folder has and a LLaVA folder does not."""

LANGUAGE_TYPES = ("llava", "llama", "llava_llama")
DTYPES = {"float32": "float32", "float16": "bfloat16", "bfloat16": "bfloat16"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConfigFile:
    """A parsed `config.json`, or an object inside it. Errors name the file and the key."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> ConfigFile:
        """Read the `config.json` of a folder.

        Raises:
            InputError: the file is missing or is not a JSON object.
        """
        path = folder / "config.json"
        return cls(path, read_json(path))

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number; null counts as missing where there is a default."""
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if type(value) is not int or value < minimum:
            raise InputError(
                f"{self.path}: {key} is {value!r}, expected a whole number of at least {minimum}; "
                "download it again"
            )
        return value

    def positive(self, key: str, default: float) -> float:
        """Return a positive number; null counts as missing."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise InputError(
                f"{self.path}: {key} is {value!r}, expected a positive number; download it again"
            )
        return float(value)

    def require(self, key: str, supported: Any, *, default: Any) -> None:
        """Refuse every value but the supported one."""
        value = self.values.get(key, default)
        if value != supported:
            raise InputError(f"{self.path}: {key} is {value!r}; only {supported!r} is supported")


def vision_config(file: ConfigFile) -> VisionConfig:
    """Return the vision encoder of a CLIP folder (all of CLIP, or its vision encoder alone).

    Raises:
        InputError: not a CLIP, an unsupported option or a damaged value.
    """
    raw = file.values
    values = raw.get("vision_config", raw) if raw.get("model_type") == "clip" else raw
    if not isinstance(values, dict):
        raise InputError(f"{file.path}: vision_config is {values!r}, expected an object")
    kind = values.get("model_type", raw.get("model_type"))
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(
            f"{file.path}: unknown model type {kind!r}; expected a CLIP vision encoder"
        )
    vision = ConfigFile(file.path, values)
    vision.require("hidden_act", "quick_gelu", default="quick_gelu")
    image = vision.integer("image_size", 224)
    patch = vision.integer("patch_size", 32)
    layers = vision.integer("num_hidden_layers", 12)
    return VisionConfig(
        width=vision.integer("hidden_size", 768),
        layers=layers,
        heads=vision.integer("num_attention_heads", 12),
        mlp=vision.integer("intermediate_size", 3072),
        patch=patch,
        canvas=image // patch * patch,
        table=image // patch,
        taps=(max(DEFAULT_TAPS[0], -1 - layers),),
        eps=vision.positive("layer_norm_eps", 1e-5),
    )


def is_pixellm(shapes: Shapes) -> bool:
    """Return whether the tensors include modules that only PixelLM has."""
    return any(name.startswith(tuple(f"model.{part}." for part in PARTS)) for name in shapes)


def count_scales(file: ConfigFile, shapes: Shapes) -> int:
    """Return the number of feature scales L of a PixelLM folder.

    It is the majority vote of the transformers, the level embedding and `config.json`.
    """
    votes = [
        _count_numbered(shapes, "model.mask_decoder.transformer."),
        file.values.get("image_feature_scale_num"),
        *_sizes(shapes, r"mask_decoder\.level_embed\.weight", 0),
    ]
    return _majority((vote for vote in votes if type(vote) is int), 1)


def pixellm_config(
    file: ConfigFile,
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    *,
    template: str | None = None,
    position_resize: str | None = None,
) -> ModelConfig:
    """Return the model of a PixelLM folder.

    The decoder's sizes follow from the shapes of its tensors; N and L come with `codebook`, for
    the released config.json does not hold them (docs/reference_notes.md 6.3). `template` and
    `position_resize` override what an exported folder states; otherwise a released folder has
    "llava_v1" and "released", the form of the position table it was trained with.

    Raises:
        InputError: an unknown model type, an unsupported option or contradictory sizes.
    """
    with _prefix_errors(file.path):
        config = _pixellm_config(file, vision, shapes, codebook)
    return _override(config, template, position_resize)


def _pixellm_config(
    file: ConfigFile, vision: VisionConfig, shapes: Shapes, codebook: CodebookConfig
) -> ModelConfig:
    exported = file.values.get(OWN_KEY)
    if exported is not None:
        if not isinstance(exported, dict):
            raise InputError(f"{OWN_KEY} is {exported!r}, expected an object")
        return from_mapping(ModelConfig, exported, OWN_KEY)
    _require_model_type(file)
    if not file.values.get("pad_train_clip_images", True):
        raise InputError(
            "pad_train_clip_images is false (centre-cropped images), which is not supported: the "
            "released PixelLM pads"
        )
    file.require("mm_vision_select_feature", "patch", default="patch")
    file.require("mm_use_im_start_end", True, default=True)
    file.require("separate_mm_projector", True, default=True)
    if codebook.scales > len(DEFAULT_TAPS):
        raise InputError(f"{codebook.scales} scales need a {OWN_KEY!r} key that names their taps")
    first = file.integer("mm_vision_select_layer", DEFAULT_TAPS[0], minimum=-1000)
    return ModelConfig(
        vision=dataclasses.replace(
            vision,
            canvas=file.integer("resize_vision_tower_size", VisionConfig.canvas),
            taps=(first, *DEFAULT_TAPS[1 : codebook.scales]),
            position_resize="released",
        ),
        language=_language_config(file, shapes),
        codebook=codebook,
        decoder=_decoder_config(shapes),
        template="llava_v1",
        dtype=_dtype(file),
    )


def llava_start_config(
    file: ConfigFile,
    vision: VisionConfig,
    shapes: Shapes,
    codebook: CodebookConfig,
    *,
    canvas: int = VisionConfig.canvas,
    template: str | None = None,
    position_resize: str | None = None,
) -> ModelConfig:
    """Return the model that a training builds around the language model of a LLaVA folder.

    What LLaVA does not define is as in the paper: the taps, the pixel decoder, the template. The
    position table has the correct form. `template` and `position_resize` override the defaults.

    Raises:
        InputError: an unknown model type, an unsupported option or contradictory sizes.
    """
    if min(codebook.tokens_per_scale, codebook.scales) < 1:
        raise InputError(f"{codebook}: expected at least one token and one scale")
    if codebook.scales > len(DEFAULT_TAPS):
        raise InputError(f"{codebook.scales} scales: expected at most {len(DEFAULT_TAPS)}")
    if canvas < 1 or canvas % vision.patch:
        raise InputError(
            f"canvas of {canvas} pixels: expected a multiple of {vision.patch}, the patch size of "
            "the vision encoder"
        )
    with _prefix_errors(file.path):
        _require_model_type(file)
        config = ModelConfig(
            vision=dataclasses.replace(
                vision,
                canvas=canvas,
                taps=DEFAULT_TAPS[: codebook.scales],
                position_resize="correct",
            ),
            language=_language_config(file, shapes),
            codebook=codebook,
            dtype=_dtype(file),
        )
    return _override(config, template, position_resize)


def initializer_range(file: ConfigFile) -> float:
    """Return the standard deviation with which transformers initialises new embedding rows."""
    return file.positive("initializer_range", 0.02)


def _override(
    config: ModelConfig, template: str | None, position_resize: str | None
) -> ModelConfig:
    vision = dataclasses.replace(
        config.vision, position_resize=position_resize or config.vision.position_resize
    )
    return dataclasses.replace(config, template=template or config.template, vision=vision)


@contextlib.contextmanager
def _prefix_errors(path: Path) -> Iterator[None]:
    """Put the name of the file in front of errors that do not contain it."""
    try:
        yield
    except InputError as error:
        line = str(error)
        raise InputError(line if str(path) in line else f"{path}: {line}") from None


def _require_model_type(file: ConfigFile) -> None:
    kind = file.values.get("model_type")
    if kind not in LANGUAGE_TYPES:
        raise InputError(
            f"unknown model type {kind!r}; expected a PixelLM or LLaVA folder (model_type one of "
            f"{', '.join(LANGUAGE_TYPES)})"
        )


def _dtype(file: ConfigFile) -> str:
    return DTYPES.get(str(file.values.get("torch_dtype") or file.values.get("dtype")), "bfloat16")


def _language_config(file: ConfigFile, shapes: Shapes) -> LanguageConfig:
    file.require("hidden_act", "silu", default="silu")
    file.require("rope_scaling", None, default=None)
    file.require("tie_word_embeddings", False, default=False)
    heads = file.integer("num_attention_heads")
    width = file.integer("hidden_size")
    rope = file.values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file.path}: rope_parameters is {rope!r}, expected an object")
    ConfigFile(file.path, rope).require("rope_type", "default", default="default")
    embedding = shapes.get("model.embed_tokens.weight")
    return LanguageConfig(
        vocabulary=embedding[0] if embedding else file.integer("vocab_size"),
        width=width,
        layers=file.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=file.integer("num_key_value_heads", heads),
        head=file.integer("head_dim", width // heads),
        mlp=file.integer("intermediate_size"),
        rope_theta=ConfigFile(file.path, {**rope, **file.values}).positive("rope_theta", 10000.0),
        eps=file.positive("rms_norm_eps", 1e-6),
        max_positions=file.integer("max_position_embeddings", 2048),
    )


def _decoder_config(shapes: Shapes) -> DecoderConfig:
    """Return the sizes of the pixel decoder, by majority vote of its tensors' shapes."""
    default = DecoderConfig()
    head = "model.mask_decoder.transformer"
    depths = (
        _count_numbered(shapes, f"{head}.{scale}.layers.") for scale in range(len(DEFAULT_TAPS))
    )
    mlp = r"mask_decoder\.transformer\.\d+\.layers\.\d+\.mlp\.lin1\.(weight|bias)"
    width = r"(mask_decoder\.(level_embed|mask_tokens|iou_token)|image_feature_neck\.[13])\.weight"
    tokens = r"mask_decoder\.(mask_tokens\.weight|iou_prediction_head\.layers\.2\.(weight|bias))"
    return DecoderConfig(
        width=_majority(_sizes(shapes, width, -1), default.width),
        mlp=_majority(_sizes(shapes, mlp, 0), default.mlp),
        depth=_majority(depths, default.depth),
        mask_tokens=_majority(_sizes(shapes, tokens, 0), default.mask_tokens),
    )


def _majority(votes: Iterable[int], default: int) -> int:
    """Return the most frequent positive vote, so that one damaged tensor is found and named."""
    counts = Counter(vote for vote in votes if vote > 0)
    return counts.most_common(1)[0][0] if counts else default


def _sizes(shapes: Shapes, pattern: str, axis: int) -> list[int]:
    matching = re.compile(rf"model\.{pattern}")
    return [shape[axis] for name, shape in shapes.items() if shape and matching.fullmatch(name)]


def _count_numbered(shapes: Shapes, prefix: str) -> int:
    """Count `PREFIX0.`, `PREFIX1.`, ... up to the first gap."""
    present = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    return next(i for i in itertools.count() if str(i) not in present)


def hf_model(config: ModelConfig) -> dict[str, Any]:
    """Build `config.json` for a model that was not imported (docs/reference_notes.md 6.3)."""
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
    """Build the `config.json` of the CLIP folder of a model that was not imported."""
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
