"""Entry point of the command line: run one command, report bad input as one line and exit code 2.

A command's module is imported only when that command is chosen, so that `pixellm --help` and
`pixellm --version` load neither JAX nor a data library.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from pixellm_jax import __version__
from pixellm_jax.cli.console import HelpFormatter
from pixellm_jax.errors import InputError


class Command(NamedTuple):
    """Entry of the command table.

    Attributes:
        module: dotted name of the module that has `add_options(parser)` and `run(options)`.
        summary: line in `pixellm --help`.
    """

    module: str
    summary: str


COMMANDS = {
    "demo": Command(
        "pixellm_jax.cli.demo", "watch a small model answer, or train one in minutes; no download"
    ),
    "convert": Command(
        "pixellm_jax.cli.convert", "PyTorch weights of PixelLM (or LLaVA) and CLIP -> a checkpoint"
    ),
    "export": Command(
        "pixellm_jax.cli.export",
        "a checkpoint -> PyTorch weights in the released layout, or StableHLO programs",
    ),
    "prepare": Command(
        "pixellm_jax.cli.prepare", "published datasets -> shards for training and evaluation"
    ),
    "data-stats": Command(
        "pixellm_jax.cli.data_stats", "statistics of prepared data: a table and a figure"
    ),
    "data-view": Command(
        "pixellm_jax.cli.data_view", "a page of samples as the model receives them"
    ),
    "segment": Command("pixellm_jax.cli.segment", "ask about images: text and one mask per target"),
    "train": Command("pixellm_jax.cli.train", "train a model by a recipe"),
    "evaluate": Command("pixellm_jax.cli.evaluate", "score a model on a benchmark"),
    "report": Command("pixellm_jax.cli.report", "write the report of an evaluation again"),
    "compare": Command("pixellm_jax.cli.compare", "compare two evaluations"),
    "judge": Command(
        "pixellm_jax.cli.judge",
        "score how well the answers of a MUSE evaluation name their targets",
    ),
    "ablate": Command(
        "pixellm_jax.cli.ablate", "train on shapes with one part of the method changed at a time"
    ),
    "bench": Command("pixellm_jax.cli.bench", "measure speed and memory on this machine"),
    "compile": Command(
        "pixellm_jax.cli.compile_step", "compile a training step for TPUs, without one"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about every checkpoint
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("pixellm_jax").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _interrupt_on_termination():
            options.run(options)
    except InputError as error:
        print(f"pixellm {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        state = getattr(options, "when_interrupted", "nothing was left behind")
        print(f"pixellm {options.command}: interrupted; {state}", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with the options of the chosen command; the other commands are names only."""
    parser = argparse.ArgumentParser(
        prog="pixellm",
        description="Ask about an image; get text and one mask per target.",
    )
    parser.add_argument("--version", action="version", version=f"pixellm {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log what is compiled and how long it takes"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, formatter_class=HelpFormatter)
        if name == chosen:
            module = import_module(command.module)
            module.add_options(subparser)
            subparser.set_defaults(run=module.run)
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    if options.overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    return options


@contextlib.contextmanager
def _interrupt_on_termination() -> Iterator[None]:
    """Make SIGTERM, which job schedulers send, end the command as cleanly as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
