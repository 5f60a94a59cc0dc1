"""Configuration of model, LoRA and mesh: frozen dataclasses that check their fields together."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from pixellm_jax.errors import InputError

DEFAULT_TAPS = (-2, -11, -17)
"""Hidden states of a 24-layer encoder that feed scale 0, 1, 2 (released model: the first two)."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Statistics of RGB on 0..255. The released weights expect these, not the values of CLIP."""

POSITION_RESIZES = ("released", "correct")
DTYPES = ("float32", "bfloat16")

TRAINING = "train config"
"""Prefix of error messages about fields of a training recipe (`LoraConfig`, `MeshConfig`)."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision encoder (CLIP ViT). Defaults: ViT-L/14-336 on a canvas of 448 pixels."""

    width: int = 1024
    """Width of the hidden states."""
    layers: int = 24
    """Number of transformer layers."""
    heads: int = 16
    """Number of attention heads."""
    mlp: int = 4096
    """Hidden width of the MLP."""
    patch: int = 14
    """Side of a patch in pixels."""
    canvas: int = 448
    """Side of the square input image in pixels."""
    table: int = 24
    """Side of the stored position table in patches (336 / 14); it is resized to the canvas."""
    taps: tuple[int, ...] = DEFAULT_TAPS[:2]
    """Hidden state per scale: 0 is the embeddings, -1 the output of the last layer."""
    position_resize: str = "released"
    """Row of the class position: "correct" is the first, as in CLIP; the released weights need
    "released", the last."""
    eps: float = 1e-5
    """Epsilon of the layer norms."""

    @property
    def grid(self) -> int:
        """Side of the canvas in patches."""
        return self.canvas // self.patch

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Number of layers before each tap, by scale."""
        return tuple(tap if tap >= 0 else self.layers + 1 + tap for tap in self.taps)

    @property
    def layers_used(self) -> int:
        """Number of layers up to the deepest tap; the rest of the encoder is never run."""
        return max(self.tap_layers)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Language model (LLaMA). Defaults: 7B with 32,000 + 8 ids."""

    vocabulary: int = 32008
    """Number of ids: rows of the embeddings and of the head."""
    width: int = 4096
    """Width of the hidden states."""
    layers: int = 32
    """Number of transformer layers."""
    heads: int = 32
    """Number of attention heads."""
    kv_heads: int = 32
    """Number of key/value heads (grouped-query attention)."""
    head: int = 128
    """Size of one attention head."""
    mlp: int = 11008
    """Hidden width of the SwiGLU MLP."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    eps: float = 1e-5
    """Epsilon of the RMS norms."""
    max_positions: int = 4096
    """Maximum length of a sequence."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Segmentation codebook: N learnable tokens at each of L feature scales per target."""

    tokens_per_scale: int = 3
    """N."""
    scales: int = 2
    """L."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Pixel decoder: one two-way transformer per scale."""

    width: int = 256
    """Width of tokens and pixels."""
    heads: int = 8
    """Number of attention heads."""
    mlp: int = 2048
    """Hidden width of the MLP."""
    depth: int = 2
    """Two-way layers per scale."""
    mask_tokens: int = 4
    """Number of learned mask tokens, of which the first is used."""
    channels: int | None = None
    """Channels of the upscaled features that the hypernetwork weighs; None is width / 8."""

    @property
    def inner(self) -> int:
        """Width of the attention between tokens and image."""
        return self.width // 2

    @property
    def upscaled(self) -> int:
        """Number of channels of the upscaled features."""
        return self.width // 8 if self.channels is None else self.channels


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model.

    Example:
        >>> ModelConfig(codebook=CodebookConfig(tokens_per_scale=1)).mask_grid
        128

    Raises:
        InputError: fields that contradict each other, named.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision encoder."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Language model."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """Segmentation codebook."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Pixel decoder."""
    image_grid: int = 16
    """Side of the grid of image positions in the language model's sequence."""
    template: str = "llava_v1"
    """Conversation template, a key of `prompt.TEMPLATES`."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of the red, green and blue values, on 0..255."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of the red, green and blue values, on 0..255."""
    dtype: str = "bfloat16"
    """Compute dtype; norms, softmax, positional codes, mask logits and losses are float32."""
    remat: bool = True
    """Rematerialisation: the backward pass recomputes each layer from its input, to save memory."""

    @property
    def image_tokens(self) -> int:
        """Number of image positions in the language model's sequence."""
        return self.image_grid**2

    @property
    def mask_grid(self) -> int:
        """Side of the fused mask logits: four times the patch grid for every L."""
        return 4 * self.vision.grid

    def __post_init__(self) -> None:
        vision = self.vision
        language = self.language
        codebook = self.codebook
        decoder = self.decoder
        for part in (vision, language, codebook, decoder, self):
            for name, value in vars(part).items():
                if type(value) in (int, float):
                    _require(0 < value < math.inf, f"{name}={value} must be above 0")
        _require(
            vision.canvas % vision.patch == 0,
            f"vision.canvas={vision.canvas} is not a multiple of vision.patch={vision.patch}",
        )
        _require(
            vision.width % vision.heads == 0,
            f"vision.width={vision.width} is not a multiple of vision.heads={vision.heads}",
        )
        _require(
            len(vision.taps) == codebook.scales,
            f"vision.taps={vision.taps} names {len(vision.taps)} hidden states, but "
            f"codebook.scales={codebook.scales}: give one tap per scale",
        )
        _require(
            all(0 <= layer <= vision.layers for layer in vision.tap_layers),
            f"vision.taps={vision.taps} reach outside the {vision.layers + 1} hidden states",
        )
        _require(
            vision.position_resize in POSITION_RESIZES,
            f"vision.position_resize={vision.position_resize!r}: choose from {POSITION_RESIZES}",
        )
        _require(
            language.heads % language.kv_heads == 0,
            f"language.heads={language.heads} is not a multiple of "
            f"language.kv_heads={language.kv_heads}",
        )
        _require(
            language.head % 2 == 0, f"language.head={language.head} must be even (rotary pairs)"
        )
        _require(
            decoder.width % (2 * decoder.heads) == 0 and decoder.width % 8 == 0,
            f"decoder.width={decoder.width} must be a multiple of 8 and of twice "
            f"decoder.heads={decoder.heads}",
        )
        for name, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            _require(
                len(values) == 3 and all(0 < value < math.inf for value in values),
                f"{name}={values}: expected three numbers above 0, for red, green and blue",
            )
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r}: choose from {DTYPES}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA pairs on frozen projections of the language model (docs/reference_notes.md 4.3)."""

    rank: int = 8
    """Rank r of the pair."""
    alpha: float = 16.0
    """The product of the pair is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout rate of the pair's input, in training."""
    projections: tuple[str, ...] = ("query", "value")
    """Projections that get a pair: attributes of `language_model.LanguageBlock`."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank={self.rank} must be at least 1", TRAINING)
        _require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1)", TRAINING)
        _require(
            len(self.projections) > 0, "lora.projections is empty; leave lora out instead", TRAINING
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1, which takes the rest."""

    data: int = 1
    """Data parallelism: copies of the weights, each with its part of the batch."""
    fsdp: int = -1
    """Fully sharded data parallelism: the batch is split, and so are the weights."""
    tensor: int = 1
    """Tensor parallelism: heads, MLP and vocabulary are split."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh={sizes}: expected sizes of at least 1, at most one of them -1 (the rest)",
            TRAINING,
        )


def _require(condition: bool, message: str, where: str = "model config") -> None:
    if not condition:
        raise InputError(f"{where}: {message}")


SIZES: dict[str, ModelConfig] = {
    "7b": ModelConfig(),
    "13b": ModelConfig(
        language=LanguageConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824)
    ),
}
"""Released model sizes by name."""

T = TypeVar("T")


def from_mapping(kind: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config") -> T:
    """Build a config dataclass from nested mappings or a ConfigDict.

    Example:
        >>> from_mapping(CodebookConfig, {"tokens_per_scale": 1, "scales": 3})
        CodebookConfig(tokens_per_scale=1, scales=3)

    Raises:
        InputError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
        arguments[key] = _convert(hints[key], value, f"{where}.{key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a group of keys, found {value!r}")
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, found {value!r}")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if type(None) in get_args(hint):
        return None if value is None else _convert(get_args(hint)[0], value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
