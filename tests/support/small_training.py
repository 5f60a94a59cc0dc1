"""A training small enough for tests: a model of a few thousand parameters on shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.loader import Loader, open_datasets
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.batch import Batch
from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import OptimizerConfig, TrainConfig

CODEBOOK = CodebookConfig(tokens_per_scale=1, scales=2)
EVERYTHING = (
    "vision_encoder",
    "image_projector",
    "mask_projector",
    "language_model",
    "codebook",
    "pixel_decoder",
)


def small_vocabulary() -> Vocabulary:
    """That of shapes, with a codebook of one token per scale."""
    return Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(CODEBOOK))


def small_model() -> ModelConfig:
    """Every part, as small as it goes; every width divides by two."""
    return ModelConfig(
        vision=VisionConfig(
            width=16, layers=2, heads=2, mlp=32, patch=16, canvas=32, table=2, taps=(-2, -2)
        ),
        language=LanguageConfig(
            vocabulary=-(-small_vocabulary().size // 2) * 2,
            width=16,
            layers=2,
            heads=2,
            kv_heads=2,
            head=8,
            mlp=32,
            max_positions=256,
        ),
        codebook=CODEBOOK,
        decoder=DecoderConfig(width=16, heads=2, mlp=16, depth=1),
        image_grid=2,
        template="plain",
        dtype="float32",
        remat=False,
    )


def small_data(batch: int = 4) -> DataConfig:
    """Two conversations per scene or so."""
    family = FamilyConfig(weight=1.0, datasets=("shapes_simple/train",))
    return DataConfig(families=(family,), batch=batch, length=128, targets=8, masks=8)


def small_train(**changes: Any) -> TrainConfig:
    """Everything trained, in a few steps."""
    values: dict[str, Any] = {
        "steps": 6,
        "lora": None,
        "trainable": EVERYTHING,
        "frozen": (),
        "optimizer": OptimizerConfig(warmup=2, learning_rate=1e-3),
        "log_every": 1,
        "evaluate_every": 0,
        "save_every": 2,
    }
    return TrainConfig(**{**values, **changes})


def lora_train(**changes: Any) -> TrainConfig:
    """As for the real models: LoRA beside frozen layers, no dropout unless asked for."""
    return small_train(
        **{
            "trainable": TrainConfig().trainable,
            "frozen": TrainConfig().frozen,
            "lora": LoraConfig(rank=2, dropout=0.0),
            **changes,
        }
    )


def small_loader(data: DataConfig | None = None, *, host: int = 0, hosts: int = 1) -> Loader:
    """Batches of shapes."""
    data = data or small_data()
    datasets = open_datasets(data, None)
    return Loader(data, small_model(), small_vocabulary(), datasets, host=host, hosts=hosts)


def small_batch(rows: int = 8) -> Batch:
    """The first batch."""
    loader = small_loader(small_data(rows))
    try:
        return Batch(*(np.asarray(array) for array in next(loader)))
    finally:
        loader.close()
