"""A training run: losses, optimizer, state, step, loop, checkpoints and log."""
