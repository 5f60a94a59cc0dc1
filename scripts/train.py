"""Trains a model: `pixellm train`, for launchers that want a script."""

import sys

from pixellm_jax.cli.main import script

if __name__ == "__main__":
    sys.exit(script("train"))
