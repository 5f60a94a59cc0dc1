"""Recipes of the shapes models: the shipped model, and the smaller one of `pixellm demo --train`.

`configs/shapes.py` gives the first; the second is stated as overrides of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.experiments.recipe import SHAPES, Recipe, with_overrides
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import OptimizerConfig, TrainConfig

DEMO_LEVEL = "simple"
"""Level of the scenes that the demo trains on (`Shapes.level`)."""

DEMO_QUESTIONS = 2
"""Questions about each of these scenes; the shipped model is trained on five."""

DEMO_OVERRIDES: Mapping[str, Any] = {
    "model.vision.width": 96,
    "model.vision.layers": 5,
    "model.vision.mlp": 384,
    "model.vision.taps": (-2, -3),
    "model.language.layers": 2,
    "model.language.max_positions": 256,
    "train.steps": 900,
    "train.optimizer.warmup": 50,
    "train.optimizer.weight_decay": 0.0,
    "train.mesh.fsdp": 1,
    "train.log_every": 10,
    "train.evaluate_every": 100,
    "train.evaluate_batches": 4,
    "train.save_every": 900,
    "train.keep_last": 1,
    "train.keep_best": 0,
    "data.families": ({"weight": 1.0, "datasets": (f"shapes_{DEMO_LEVEL}/train",)},),
    "data.length": 176,
    "data.targets": 6,
    "validation.families": ({"weight": 1.0, "datasets": (f"shapes_{DEMO_LEVEL}/val",)},),
    "validation.length": 176,
    "validation.targets": 6,
    "validation.batch": 32,
}
"""Dotted key of `shapes_recipe()` -> value: 1.2 million parameters, about 3 minutes on 2 cores."""


def shapes_recipe() -> Recipe:
    """Return the recipe of the shipped model: 2.6 million parameters, full scenes."""
    codebook = CodebookConfig(tokens_per_scale=2, scales=2)
    vocabulary = Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(codebook))
    model = ModelConfig(
        vision=VisionConfig(
            width=128,
            layers=6,
            heads=4,
            mlp=512,
            patch=12,
            canvas=96,
            table=8,
            taps=(-2, -4),
            position_resize="correct",
        ),
        language=LanguageConfig(
            vocabulary=vocabulary.size,
            width=128,
            layers=6,
            heads=4,
            kv_heads=4,
            head=32,
            mlp=352,
            max_positions=512,
        ),
        codebook=codebook,
        decoder=DecoderConfig(width=48, heads=4, mlp=96, depth=1, channels=16),
        image_grid=8,
        template="plain",
        dtype="float32",
        remat=False,
    )
    data = DataConfig(
        families=(FamilyConfig(weight=1.0, datasets=("shapes/train",)),),
        batch=8,
        length=312,
        targets=15,
        masks=96,
    )
    validation = dataclasses.replace(
        data, families=(FamilyConfig(weight=1.0, datasets=("shapes/val",)),), seed=1
    )
    train = TrainConfig(
        steps=11000,
        lora=None,
        trainable=(
            "vision_encoder",
            "image_projector",
            "mask_projector",
            "language_model",
            "codebook",
            "pixel_decoder",
        ),
        frozen=(),
        optimizer=OptimizerConfig(
            method="muon", learning_rate=1e-3, b2=0.98, weight_decay=0.2, schedule="cosine"
        ),
        log_every=50,
        evaluate_every=1000,
        evaluate_batches=16,
        save_every=500,
    )
    return Recipe(model=model, data=data, train=train, validation=validation, tokenizer=SHAPES)


def demo_recipe(*, seed: int = 0) -> Recipe:
    """Return the recipe of `pixellm demo --train`; validation scenes do not depend on `seed`."""
    return with_overrides(
        shapes_recipe(), {**DEMO_OVERRIDES, "train.seed": seed, "data.seed": seed}
    )
