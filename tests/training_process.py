"""A training in a process of its own, for tests that kill it: RUN STEPS SAVE_EVERY."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from pixellm_jax.sharding import make_mesh
from pixellm_jax.train import fit
from pixellm_jax.train_config import MeshConfig
from pixellm_jax.train_state import make_blueprint
from tests.small_training import lora_train, small_loader, small_model


def main(run: Path, steps: int, save_every: int) -> None:
    """Trains over all devices and writes the last weights to RUN/final.npz."""
    train = lora_train(steps=steps, save_every=save_every, keep_last=2)
    batches = small_loader()
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    outcome = fit(make_blueprint(small_model(), train), batches, run=run, mesh=mesh)
    batches.close()
    if outcome.finished:
        np.savez(run / "final.npz", *jax.tree.leaves(jax.device_get(outcome.state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
