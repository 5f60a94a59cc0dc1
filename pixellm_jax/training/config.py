"""What configures a training: what is trained and how, over which mesh, and what is kept."""

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
FROZEN = ("vision_encoder", "language_model.layers", "language_model.norm")
"""What the paper trains beside LoRA, and what it leaves as it is."""

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
    """Weights of the terms, and of pixels that several predictions claim.

    See docs/reference_notes.md 4.2.
    `alpha`: weight of the target refinement loss at pixels where at least two predicted masks of
    the same question are positive; 1 is the plain BCE of the released code.
    """

    text: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    alpha: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(0 <= value < math.inf, f"loss.{name}={value} must be at least 0")
        _require(self.alpha >= 1, f"loss.alpha={self.alpha} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then `schedule` down to 0 at the last step.

    See docs/reference_notes.md 4.1.
    `method`: "adamw", or "muon" for models that nobody trained before: Muon (Jordan 2024; as in
    arXiv 2502.16982) for the matrices of vision encoder, projectors and language model, NAdamW for
    the rest. `clip`: largest global norm of the gradient.
    """

    method: str = "adamw"
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 100
    schedule: str = "linear"

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

    `steps`: updates. `accumulation`: micro-batches of one update. `trainable`, `frozen`: dotted
    names of modules or parameters; the longest that fits decides, LoRA pairs are always trained.
    `max_skipped`: the run stops after so many steps in a row without finite gradients.
    `log_every`, `evaluate_every`, `save_every`: in steps; 0 leaves evaluation out.
    `evaluate_batches`: how many batches of the validation stream one evaluation takes.
    `keep_last`, `keep_best`: checkpoints that are kept, the latest and those of the best gIoU.

    Raises:
        InputError: a value that makes no sense.
    """

    steps: int = 5000
    accumulation: int = 1
    seed: int = 0
    trainable: tuple[str, ...] = TRAINABLE
    frozen: tuple[str, ...] = FROZEN
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    max_skipped: int = 10
    log_every: int = 10
    evaluate_every: int = 500
    evaluate_batches: int = 16
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1

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
