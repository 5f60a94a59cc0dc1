"""`pixellm bench`: how fast this machine is, with random weights of a named size."""

from __future__ import annotations

import argparse
from typing import Any

from pixellm_jax.cli import bench_generate, bench_train


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the command and what it can measure."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure speed and memory on this machine",
        description="Measures with random weights and data; nothing is read or written.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for module in (bench_train, bench_generate):
        module.add_parser(kinds).set_defaults(measure=module.run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Measures and prints."""
    options.measure(options)
