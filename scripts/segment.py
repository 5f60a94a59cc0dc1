"""Runs `pixellm segment` from a checkout: python scripts/segment.py --help"""

import sys

from pixellm_jax.cli.main import script

if __name__ == "__main__":
    sys.exit(script("segment"))
