"""Training in a process of its own, for tests that kill it: RUN STEPS SAVE_EVERY.

Everything that must survive takes part: LoRA with dropout, a best score, and steps slow enough that
a kill falls between any two of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.loader import Loader
from pixellm_jax.batch import Batch
from pixellm_jax.config import LoraConfig, MeshConfig
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.loop import fit
from pixellm_jax.training.state import make_blueprint
from pixellm_jax.training.validation import Validation
from tests.support.small_training import lora_train, small_loader, small_model

SECONDS = 0.1
"""Shortest duration of a step."""


class SlowLoader:
    """Loader that waits before every batch."""

    def __init__(self, batches: Loader) -> None:
        self.batches = batches

    def __next__(self) -> Batch:
        time.sleep(SECONDS)
        return next(self.batches)

    def get_state(self) -> dict[str, Any]:
        return self.batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.batches.set_state(state)


def falling_score(model: PixelLM) -> Validation:
    """Return a score that falls as LoRA grows from zero: the first one is the best."""
    size = jnp.abs(model.language_model.layers.query.lora.up[...]).sum()
    return Validation({"giou": -float(size)})


def main(run: Path, steps: int, save_every: int) -> None:
    """Train on all devices and write the last weights to RUN/final.npz."""
    train = lora_train(
        steps=steps,
        save_every=save_every,
        evaluate_every=save_every,
        keep_last=2,
        keep_best=1,
        lora=LoraConfig(rank=2, dropout=0.05),
    )
    batches = small_loader()
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    blueprint = make_blueprint(small_model(), train)
    outcome = fit(blueprint, SlowLoader(batches), run=run, mesh=mesh, evaluate=falling_score)
    batches.close()
    if outcome.finished:
        np.savez(run / "final.npz", *jax.tree.leaves(jax.device_get(outcome.state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
