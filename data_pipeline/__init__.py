"""Bytes on disk -> `pixellm_jax.batch.Batch`. Sees only the two lowest layers of `pixellm_jax`."""
