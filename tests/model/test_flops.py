"""Counted operations: against XLA's own count of small models, and by hand."""

from __future__ import annotations

import jax
import pytest

from pixellm_jax import batch as batches
from pixellm_jax.config import (
    SIZES,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.model import flops
from pixellm_jax.training.config import FROZEN, TRAINABLE, TrainConfig
from pixellm_jax.training.losses import losses
from pixellm_jax.training.state import make_blueprint

# XLA counts the body of a scan once, so every scan here has one layer. It also counts what is done
# element by element and the resizing of maps and masks: a few hundredths at these widths.
LEAST, MOST = 1.0, 1.06
CONFIG = ModelConfig(
    vision=VisionConfig(
        width=128, layers=2, heads=4, mlp=512, patch=8, canvas=64, table=8, taps=(2, 1)
    ),
    language=LanguageConfig(
        vocabulary=1024, width=192, layers=1, heads=6, kv_heads=3, head=32, mlp=512
    ),
    decoder=DecoderConfig(width=64, heads=4, mlp=256, depth=2),
    image_grid=4,
    dtype="float32",
    remat=False,
)
SHAPE = {"images": 2, "length": 96, "targets": 3}

# Half as much time without XLA's optimisations of the machine code; the count is the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

LANGUAGE = ("language_model", "image_projector", "mask_projector", "codebook")
RECIPES = {
    "the paper's": TrainConfig(),
    "all but the vision encoder": TrainConfig(
        lora=None, trainable=(*LANGUAGE, "pixel_decoder"), frozen=("vision_encoder",)
    ),
    "everything": TrainConfig(
        lora=None, trainable=(*LANGUAGE, "pixel_decoder", "vision_encoder"), frozen=()
    ),
    "the pixel decoder": TrainConfig(
        lora=None, trainable=("pixel_decoder",), frozen=(*LANGUAGE, "vision_encoder")
    ),
    "the paper's without low-rank pairs": TrainConfig(
        lora=None, trainable=TRAINABLE, frozen=FROZEN
    ),
}


def lowered(train: TrainConfig | None) -> tuple[jax.stages.Lowered, flops.Parts]:
    """The program of one step, or of a forward pass, and what we count for it."""
    blueprint = make_blueprint(CONFIG, train or TrainConfig())
    values = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in blueprint.shapes.items()}
    trained = {name: values.pop(name) for name in blueprint.trainable}
    spec = batches.spec(CONFIG, batch=2, length=96, targets=3, masks=32)

    def loss(trained: dict, frozen: dict, batch: batches.Batch) -> jax.Array:
        return losses(blueprint.assemble(trained | frozen)(batch), batch).total

    if train is None:
        return jax.jit(loss).lower(trained, values, spec), flops.forward_flops(CONFIG, **SHAPE)
    parts = flops.train_flops_of_parts(CONFIG, blueprint.trainable, **SHAPE)
    assert flops.train_flops(CONFIG, blueprint.trainable, **SHAPE) == sum(parts)
    return jax.jit(jax.value_and_grad(loss)).lower(trained, values, spec), parts


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_count_is_that_of_xla(recipe):
    program, parts = lowered(RECIPES[recipe] if recipe else None)
    assert min(parts) > 0
    assert LEAST <= program.cost_analysis()["flops"] / sum(parts) <= MOST


def test_count_is_that_of_the_compiled_program():
    program, parts = lowered(RECIPES["the paper's"])
    found = program.compile(QUICK).cost_analysis()["flops"]
    assert LEAST <= found / sum(parts) <= MOST


def test_seven_billion_by_hand():
    config, length = SIZES["7b"], 1000
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 2 * 2 * length**2 * 4096
    forward = flops.forward_flops(config, images=3, length=length, targets=0)
    assert forward.language_model == 3 * (2 * length * layers + attention)
    assert forward.head == 3 * 2 * length * 4096 * 32008

    def step(train: TrainConfig) -> flops.Parts:
        trainable = make_blueprint(config, train).trainable
        return flops.train_flops_of_parts(config, trainable, images=3, length=length, targets=0)

    # Frozen weights: forward, and the gradient of what they are multiplied with. Attention has no
    # weights. The vision encoder has nothing trained before it or in it.
    paper = step(TrainConfig())
    assert paper.vision_encoder == forward.vision_encoder
    assert paper.language_model == 3 * (2 * 2 * length * layers + 3 * attention)
    assert paper.head == 3 * forward.head
    whole = step(RECIPES["everything"])
    assert whole.language_model == 3 * forward.language_model
    assert whole.image_features == 3 * forward.image_features
    patches = 3 * 2 * 32**2 * 3 * 14**2 * 1024  # pixels have no gradient
    assert whole.vision_encoder == 3 * forward.vision_encoder - patches


def test_speeds_of_this_device():
    assert 1e8 < flops.matmul_peak("float32") < 1e16
    assert 1e7 < flops.copy_bandwidth() < 1e14
    assert flops.matmul_peak("float32") == flops.matmul_peak("float32")  # measured once
