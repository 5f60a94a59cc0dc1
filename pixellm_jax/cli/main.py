"""`pixellm COMMAND ...`: finds the command, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from pixellm_jax import __version__
from pixellm_jax.cli import (
    bench,
    compare,
    compile_step,
    convert,
    data_stats,
    data_view,
    demo,
    evaluate,
    export,
    judge,
    prepare,
    report,
    segment,
    train,
)
from pixellm_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0, 2 for bad input, 130 when interrupted)."""
    parser = argparse.ArgumentParser(
        prog="pixellm",
        description="Ask about a picture; get text and one mask per target.",
    )
    parser.add_argument("--version", action="version", version=f"pixellm {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what is compiled, and how long it takes"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        demo,
        convert,
        export,
        prepare,
        data_stats,
        data_view,
        segment,
        train,
        evaluate,
        report,
        compare,
        judge,
        bench,
        compile_step,
    ):
        module.add_parser(commands).set_defaults(run=module.run)
    options, changes = parser.parse_known_args(arguments)
    options.changes = changes
    if options.changes and not getattr(options, "takes_changes", False):
        parser.error(f"unrecognized arguments: {' '.join(options.changes)}")
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("pixellm_jax").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may leave a terminal's set
    try:
        with _interrupt_on_termination():
            options.run(options)
    except InputError as error:
        print(f"pixellm {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        left = getattr(options, "when_interrupted", "nothing was left behind")
        print(f"pixellm {options.command}: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _interrupt_on_termination() -> Iterator[None]:
    """Makes SIGTERM, which job schedulers send, end the command as Ctrl-C does: tidily."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def script(command: str) -> int:
    """What `scripts/<command>.py` runs: the same command, its name given by the script."""
    return main([command, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
