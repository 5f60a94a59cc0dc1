"""Configuration of a training run: trained parameters, losses, optimizer, mesh, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pixellm_jax.config import LoraConfig, MeshConfig
from pixellm_jax.errors import InputError

METHODS = ("adamw", "muon")
SCHEDULES = ("linear", "cosine", "constant")

TRAINABLE = (
    "language_model.embedding",
    "language_model.head",
    "image_projector",
    "mask_projector",
    "codebook",
    "pixel_decoder",
)
"""Parameters that the paper trains in addition to LoRA."""

FROZEN = ("vision_encoder", "language_model.layers", "language_model.norm")
"""Parameters that the paper freezes."""

REFERENCE_FROZEN = (
    *FROZEN,
    "pixel_decoder.neck",
    "pixel_decoder.dense",
    "codebook.token_fusion",
    "codebook.mask_fusion",
)
"""Frozen by the released script: more than the paper says (docs/reference_notes.md 4.4, T3)."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms (docs/reference_notes.md 4.2)."""

    text: float = 1.0
    """Weight of the text cross-entropy."""
    bce: float = 2.0
    """Weight of the binary cross-entropy of the masks."""
    dice: float = 0.5
    """Weight of the Dice loss of the masks."""
    alpha: float = 2.0
    """Weight of pixels where at least two predicted masks of one question are positive, at least 1
    (target refinement loss); 1 is the plain BCE of the released code."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(0 <= value < math.inf, f"loss.{name}={value} must be at least 0")
        _require(self.alpha >= 1, f"loss.alpha={self.alpha} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate schedule (docs/reference_notes.md 4.1)."""

    method: str = "adamw"
    """Update rule: "adamw", or "muon" for training from scratch: Muon (Jordan 2024; as in arXiv
    2502.16982) for the matrices of vision encoder, projectors and language model, NAdamW for the
    rest."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    b1: float = 0.9
    """Decay of Adam's first moment, in [0, 1)."""
    b2: float = 0.95
    """Decay of Adam's second moment, in [0, 1)."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    warmup: int = 100
    """Updates of the linear warm-up from 0."""
    schedule: str = "linear"
    """Decay to 0 at the last update: "linear" or "cosine"; "constant" does not decay."""

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"optimizer.method={self.method!r}: choose from {METHODS}")
        _require(
            0 < self.learning_rate < math.inf,
            f"optimizer.learning_rate={self.learning_rate} must be above 0",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}={value} must be in [0, 1)")
        _require(self.clip > 0, f"optimizer.clip={self.clip} must be above 0")
        _require(self.warmup >= 0, f"optimizer.warmup={self.warmup} must not be negative")
        _require(
            self.schedule in SCHEDULES,
            f"optimizer.schedule={self.schedule!r}: choose from {SCHEDULES}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Raises:
        InputError: a value is out of range.
    """

    steps: int = 5000
    """Number of updates."""
    accumulation: int = 1
    """Micro-batches per update."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    trainable: tuple[str, ...] = TRAINABLE
    """Dotted names of trained modules or parameters; the longest match in `trainable` and `frozen`
    decides. LoRA pairs are always trained."""
    frozen: tuple[str, ...] = FROZEN
    """Dotted names of frozen modules or parameters."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """LoRA of the language model; None trains without."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate schedule."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Mesh of devices."""
    max_skipped: int = 10
    """Consecutive steps without finite gradients after which the run stops."""
    log_every: int = 10
    """Steps between two log records."""
    evaluate_every: int = 500
    """Steps between two validations; 0 disables validation."""
    evaluate_batches: int = 16
    """Batches of the validation stream per validation."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Latest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints of the best validation gIoU to keep."""

    def __post_init__(self) -> None:
        positive = ("steps", "accumulation", "max_skipped", "log_every", "save_every")
        for name in (*positive, "evaluate_batches"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("evaluate_every", "keep_best", "seed"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        _require(self.keep_last >= 1, f"keep_last={self.keep_last} must be at least 1")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"train config: {message}")
