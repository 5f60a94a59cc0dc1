"""The schedule, by hand, and AdamW with clipping against a loop in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixellm_jax.optimizer import make_optimizer, schedule
from pixellm_jax.train_config import OptimizerConfig

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
    optimizer = make_optimizer(config, 5)
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
