"""`pixellm COMMAND ...`: finds the command, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pixellm_jax import __version__
from pixellm_jax.cli import convert, export, segment
from pixellm_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0, 2 for bad input, 130 when interrupted)."""
    parser = argparse.ArgumentParser(
        prog="pixellm",
        description="Ask about a picture; get text and one mask per target.",
    )
    parser.add_argument("--version", action="version", version=f"pixellm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (convert, export, segment):
        module.add_parser(commands).set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"pixellm {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pixellm {options.command}: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


def script(command: str) -> int:
    """What `scripts/<command>.py` runs: the same command, its name given by the script."""
    return main([command, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
