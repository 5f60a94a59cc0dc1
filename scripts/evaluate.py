"""Runs `pixellm evaluate` from a checkout."""

import sys

from pixellm_jax.cli.main import script

if __name__ == "__main__":
    sys.exit(script("evaluate"))
