"""`python -m pixellm_jax COMMAND ...`: the same as `pixellm COMMAND ...`."""

import sys

from pixellm_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
