"""The schedule, by hand, and AdamW with clipping against a loop in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixellm_jax.training.config import OptimizerConfig
from pixellm_jax.training.optimizer import MUON_RMS, make_optimizer, schedule

# float32 against float64.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name, late", [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_schedule(name, late):
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup=10, schedule=name), 110)
    assert rate(0) == pytest.approx(0.2)
    assert rate(4) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(2.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(2.0 * late)
    assert rate(110) == pytest.approx(2.0 if name == "constant" else 0.0, abs=1e-6)


def test_without_warmup_it_starts_at_the_peak():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup=0), 4)
    assert [float(rate(step)) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_adamw_with_clipping():
    config = OptimizerConfig(learning_rate=0.1, warmup=0, schedule="constant", clip=1.0)
    optimizer = make_optimizer(config, 5, {"w": "embed"})
    rng = np.random.default_rng(0)
    value = rng.normal(size=7)
    trained = {"w": jnp.asarray(value, jnp.float32)}
    state = optimizer.init(trained)
    first = second = np.zeros(7)
    for step in range(1, 6):
        gradient = 3 * rng.normal(size=7)
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, trained)
        trained = jax.tree.map(jnp.add, trained, updates)
        clipped = gradient / max(1.0, float(np.linalg.norm(gradient)))
        first = 0.9 * first + 0.1 * clipped
        second = 0.95 * second + 0.05 * clipped**2
        hat = first / (1 - 0.9**step), second / (1 - 0.95**step)
        value = value - 0.1 * hat[0] / (np.sqrt(hat[1]) + 1e-8)
    np.testing.assert_allclose(trained["w"], value, rtol=TOLERANCE, atol=TOLERANCE)


# name -> axes, shape, and how many of its leading axes are rows (after a stack of layers).
MATRICES = {
    "query": ("layer embed heads head", (2, 12, 2, 4), 1),
    "out": ("layer heads head embed", (2, 2, 4, 12), 2),
    "projector": ("vision mlp", (6, 10), 1),
}
OTHERS = {
    "embedding": ("vocab embed", (9, 12)),
    "norm": ("layer embed", (2, 12)),
    "bias": ("layer heads head", (2, 2, 4)),
    "decoder": ("embed decoder", (12, 6)),
    "pair": ("embed rank", (12, 2)),
    "patch": ("kernel_rows kernel_columns colour vision", (2, 2, 3, 6)),
}


def test_muon_turns_gradients_of_matrices_into_rotations():
    """Of every layer for itself: the momentum U S V' becomes U V', in entries as large as said.

    optax's five Newton-Schulz steps leave singular values between about 0.7 and 1.2 where those of
    the momentum are not tiny beside the largest one, as none is here.
    """
    config = OptimizerConfig(method="muon", learning_rate=0.5, warmup=0, schedule="constant")
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(config, 5, {name: axes for name, (axes, *_) in MATRICES.items()})
    weights = {name: jnp.zeros(shape) for name, (_, shape, _) in MATRICES.items()}
    gradient = {name: jnp.asarray(rng.normal(size=w.shape)) for name, w in weights.items()}
    updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
    for name, (axes, shape, rows) in MATRICES.items():
        layers = shape[0] if axes.startswith("layer") else 1
        first = int(axes.startswith("layer"))
        height = int(np.prod(shape[first : first + rows]))
        for g, u in zip(
            *(
                np.asarray(x[name], np.float64).reshape(layers, height, -1)
                for x in (gradient, updates)
            ),
            strict=True,
        ):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            inner = left.T @ -u @ right.T / (0.5 * MUON_RMS * max(g.shape) ** 0.5)
            assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.02  # the same directions
            assert np.diag(inner).min() > 0.6 and np.diag(inner).max() < 1.3
            assert np.sqrt(np.mean(u**2)) == pytest.approx(0.5 * MUON_RMS, rel=0.3)


def test_what_is_no_matrix_has_nadamw_beside_muon():
    rng = np.random.default_rng(0)
    axes = {name: own for name, (own, _) in OTHERS.items()}
    weights = {n: jnp.asarray(rng.normal(size=shape)) for n, (_, shape) in OTHERS.items()}
    gradient = {n: jnp.asarray(rng.normal(size=w.shape)) for n, w in weights.items()}
    config = OptimizerConfig(method="muon", weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-3)
    right = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.nadamw(schedule(config, 5), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1),
    )
    found = []
    for optimizer in (make_optimizer(config, 5, axes), right):
        found.append(optimizer.update(gradient, optimizer.init(weights), weights)[0])
    for name in OTHERS:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-6)
