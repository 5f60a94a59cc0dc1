"""Trains the small model of shapes with one part of the method changed at a time.

python scripts/ablate.py --dry-run
"""

import sys

from pixellm_jax.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
