"""Several processes that work together: how one of them meets the others."""

from __future__ import annotations

import os

import jax

from pixellm_jax.errors import InputError

JOINING = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What tells a process of the others where nothing can be found out."""

HELP = (
    "one of several processes: on TPU pods and SLURM all is found; elsewhere set "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)


def join() -> None:
    """Meets the other processes.

    Raises:
        InputError: they were not found.
    """
    address, count, number = map(os.environ.get, JOINING)
    try:
        jax.distributed.initialize(
            address,
            num_processes=None if count is None else int(count),
            process_id=None if number is None else int(number),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the processes did not meet ({error}); set {', '.join(JOINING)} in each"
        ) from None
