"""`pixellm train` as a script, for launchers that start a file: `python scripts/train.py ...`."""

import sys

from pixellm_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
