"""Options that several commands share: a recipe with overrides, and several processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jax

from pixellm_jax.errors import InputError

PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that describe the cluster where JAX cannot detect it."""


def add_recipe_option(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`, and accept `--config.KEY=VALUE` overrides in `options.overrides`."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe")
    parser.set_defaults(takes_overrides=True)


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    """Add `--distributed`, which `initialize_distributed` serves."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes: detected on TPU pods and SLURM; elsewhere set "
        f"{', '.join(PROCESS_VARIABLES[:-1])} and {PROCESS_VARIABLES[-1]}",
    )


def initialize_distributed() -> None:
    """Connect to the other processes of the run (`jax.distributed`).

    Raises:
        InputError: the processes did not find each other.
    """
    address, count, index = map(os.environ.get, PROCESS_VARIABLES)
    try:
        jax.distributed.initialize(
            address,
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the processes did not connect ({error}); set "
            f"{', '.join(PROCESS_VARIABLES)} in each"
        ) from None
