"""The training of `pixellm demo --train`: its recipe, its curves, and what it is compared with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.loader import Loader, open_datasets
from data_pipeline.sources.shapes.dataset import Shapes
from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.batch import Batch
from pixellm_jax.config import (
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    MeshConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.evaluation.metrics import measure, merge, scores, tally
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import make_mesh
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.config import OptimizerConfig, TrainConfig
from pixellm_jax.training.export import write_model
from pixellm_jax.training.log import METRICS
from pixellm_jax.training.loop import Evaluation, fit
from pixellm_jax.training.state import initial_state, make_blueprint
from pixellm_jax.training.validation import evaluate_given

LEVEL = "simple"
QUESTIONS = 2
"""About each scene that is trained on."""

CODEBOOK = CodebookConfig(tokens_per_scale=2, scales=2)

TRAIN = TrainConfig(
    steps=900,
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
        method="muon", learning_rate=1e-3, b2=0.98, warmup=50, schedule="cosine"
    ),
    mesh=MeshConfig(fsdp=1),
    log_every=10,
    evaluate_every=100,
    evaluate_batches=4,
    save_every=900,
    keep_last=1,
    keep_best=0,
)
DATA = DataConfig(
    families=(FamilyConfig(weight=1.0, datasets=(f"shapes_{LEVEL}/train",)),),
    batch=8,
    length=176,
    targets=6,
    masks=96,
)
HELD_OUT = dataclasses.replace(
    DATA,
    families=(FamilyConfig(weight=1.0, datasets=(f"shapes_{LEVEL}/val",)),),
    batch=32,
    seed=1,
)
"""The scenes of the curve."""

SEEN_SCENES = 400
"""Training scenes that the constant mask is chosen on."""


class Trained(NamedTuple):
    """A training, with points (step, value) of its curves.

    losses: on training scenes. gious: on held-out scenes, the words of the answers given; the first
    is that of the untrained model, at step 0. constant: gIoU of the best constant mask there.
    """

    losses: list[tuple[float, float]]
    gious: list[tuple[float, float]]
    constant: float
    steps: int
    seconds: float


def make_model_config(vocabulary: int) -> ModelConfig:
    """The model: 1.2 million parameters."""
    return ModelConfig(
        vision=VisionConfig(
            width=96,
            layers=5,
            heads=4,
            mlp=384,
            patch=12,
            canvas=96,
            table=8,
            taps=(-2, -3),
            position_resize="correct",
        ),
        language=LanguageConfig(
            vocabulary=vocabulary,
            width=128,
            layers=2,
            heads=4,
            kv_heads=4,
            head=32,
            mlp=352,
            max_positions=256,
        ),
        codebook=CODEBOOK,
        decoder=DecoderConfig(width=48, heads=4, mlp=96, depth=1, channels=16),
        image_grid=8,
        template="plain",
        dtype="float32",
        remat=False,
    )


def train(out: Path, *, seed: int) -> Trained:
    """Trains from nothing and writes the model to `out`.

    Raises:
        KeyboardInterrupt: it was told to stop before the end.
    """
    begin = time.perf_counter()
    vocabulary = Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(CODEBOOK))
    config, recipe = make_model_config(vocabulary.size), dataclasses.replace(TRAIN, seed=seed)
    blueprint = make_blueprint(config, recipe)
    mesh = make_mesh(recipe.mesh, jax.local_devices()[:1])
    held_out = _batches(HELD_OUT, config, vocabulary, recipe.evaluate_batches)
    evaluate = partial(_evaluate, held_out, mesh, recipe)
    untrained = evaluate(blueprint.model(initial_state(blueprint, mesh, None)))
    data = dataclasses.replace(DATA, seed=seed)
    batches = Loader(data, config, vocabulary, _datasets(data))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        run = Path(folder)
        try:
            outcome = fit(blueprint, batches, run=run, mesh=mesh, evaluate=evaluate)
        finally:
            batches.close()
        if not outcome.finished:
            raise KeyboardInterrupt
        write_model(run, recipe.steps, out, blueprint, vocabulary)
        records = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    return Trained(
        losses=_points(records, "loss/total"),
        gious=[(0.0, untrained.scores["giou"]), *_points(records, "validation/giou")],
        constant=_score_constant(choose_constant(_asked_masks()), held_out),
        steps=recipe.steps,
        seconds=time.perf_counter() - begin,
    )


def choose_constant(masks: Bool[np.ndarray, "m y x"]) -> Bool[np.ndarray, "y x"]:
    """One mask for everything, that of the best mean IoU with all of these among some.

    Those are the pixels where at least a share of the masks is inside, for every share.
    """
    heat = masks.mean(0)
    shares = np.quantile(heat, np.linspace(0, 1, 65))
    return max((heat >= share for share in shares), key=partial(_mean_iou, masks))


def _mean_iou(masks: Bool[np.ndarray, "m y x"], constant: Bool[np.ndarray, "y x"]) -> float:
    whole = np.broadcast_to(constant, masks.shape)
    return scores(tally(measure(whole, masks.view(np.uint8)))).giou


def _score_constant(constant: Bool[np.ndarray, "y x"], batches: Sequence[Batch]) -> float:
    """gIoU on the targets of batches."""
    parts = [
        tally(
            measure(np.broadcast_to(constant, batch.masks.shape), batch.masks),
            valid=batch.target_valid,
        )
        for batch in batches
    ]
    return scores(merge(*parts)).giou


def _asked_masks() -> Bool[np.ndarray, "m y x"]:
    """Masks of all targets of questions about some training scenes."""
    shapes = Shapes(split="train", level=LEVEL, questions=QUESTIONS)
    drawn = map(shapes.draw, range(SEEN_SCENES))
    return np.concatenate(
        [d.scene.masks()[list(question.targets)] for d in drawn for question in d.questions]
    )


def _batches(
    data: DataConfig, config: ModelConfig, vocabulary: Vocabulary, count: int
) -> list[Batch]:
    loader = Loader(data, config, vocabulary, _datasets(data))
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def _datasets(data: DataConfig) -> dict[str, Shapes]:
    """As `open_datasets`, with fewer questions about a scene."""
    return {
        name: dataclasses.replace(shapes, questions=QUESTIONS)
        for name, shapes in open_datasets(data, None).items()
        if isinstance(shapes, Shapes)
    }


def _evaluate(
    batches: Sequence[Batch], mesh: jax.sharding.Mesh, recipe: TrainConfig, model: PixelLM
) -> Evaluation:
    return Evaluation(evaluate_given(model, batches, mesh, recipe.loss).scores)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), record[name]) for record in records if name in record]
