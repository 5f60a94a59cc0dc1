"""Compiles the training step ahead of time for TPUs that are not there, and reads what it became.

libtpu compiles for a described machine ("v5e:4x4") on any host; nothing is run. What it says about
memory is the compiler's plan, which a real machine follows.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from pixellm_jax.errors import InputError
from pixellm_jax.perf.hlo import Array, Instruction, collectives
from pixellm_jax.training.state import Blueprint
from pixellm_jax.training.step import batch_spec, make_step

HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of one chip by the first word of a topology, from Google's published tables."""

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_SKIP_MDS_QUERY": "1",  # this host is no TPU VM: nobody to ask
    "TPU_STDERR_LOG_LEVEL": "3",  # it complains of that on standard error
    "TPU_MIN_LOG_LEVEL": "3",
}

XLA_NAMES = {"bfloat": "bf", "float": "f", "int": "s", "uint": "u", "bool": "pred"}
"""Of dtypes, without their size."""


class Memory(NamedTuple):
    """Bytes on one chip: the state and the batch, what the step needs beside, and both at most."""

    arguments: int
    temporaries: int
    peak: int


class Compiled(NamedTuple):
    """A compiled step. `text`: of the program of one chip."""

    seconds: float
    memory: Memory
    text: str


def describe(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology such as "v5e:4x4" (chips along x and y).

    Raises:
        InputError: libtpu is not installed, or knows no such topology.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except RuntimeError as error:  # JaxRuntimeError is one
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise InputError(
                "libtpu is not installed: pip install 'pixellm_jax[tpu]' (with JAX's own [tpu])"
            ) from None
        raise InputError(
            f"--topology {topology}: {reason}; name a generation and its chips, as in v5e:4x4"
        ) from None
    return found.devices


def compile_step(
    blueprint: Blueprint, mesh: Mesh, *, batch: int, length: int, targets: int, masks: int
) -> Compiled:
    """Compiles the training step for the devices of `mesh`; arguments as `batch.spec`.

    Raises:
        InputError: it does not fit into their memory.
    """
    spec = batch_spec(
        blueprint.config, mesh, batch=batch, length=length, targets=targets, masks=masks
    )
    step: Any = make_step(blueprint, mesh)
    lowered = step.lower(blueprint.state(mesh), spec)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        raise InputError(
            f"does not fit: {reason}; take more micro-batches (train.accumulation), more chips, or "
            "more of them along mesh.tensor"
        ) from None
    seconds, plan = time.perf_counter() - begin, compiled.memory_analysis()
    return Compiled(
        seconds=seconds,
        memory=Memory(
            arguments=plan.argument_size_in_bytes,
            temporaries=plan.temp_size_in_bytes,
            peak=plan.peak_memory_in_bytes,
        ),
        text=compiled.as_text(),
    )


class Shard(NamedTuple):
    """What one chip holds of an array of the state."""

    name: str
    whole: Array
    own: Array


def shards(state: Any) -> list[Shard]:
    """Of every array of a state of shapes and shardings, the largest first."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        dtype = re.sub("^[a-z]+", lambda kind: XLA_NAMES[kind.group()], leaf.dtype.name)
        own = leaf.sharding.shard_shape(leaf.shape)
        found.append(Shard(name, Array(dtype, leaf.shape), Array(dtype, own)))
    return sorted(found, key=lambda shard: -shard.own.bytes)


def vocabulary_gathers(text: str, vocabulary: int) -> list[Instruction]:
    """All-gathers that put the whole vocabulary on one chip."""
    return [
        each
        for each in collectives(text)
        if each.kind == "all-gather" and any(vocabulary in a.shape for a in each.arrays)
    ]


class Gathered(NamedTuple):
    """A parameter that lies spread over chips and is whole on each of them for a while."""

    name: str
    stacked: bool
    gather: Instruction


def gathered_parameters(text: str, blueprint: Blueprint, mesh: Mesh) -> list[Gathered]:
    """The parameters of a million numbers and more that an all-gather makes whole.

    Found by their shape, so parameters of one shape are found together. One layer of a stack has
    another shape than the stack; it is gathered in its turn and not listed.
    """
    gathers: dict[tuple[int, ...], Instruction] = {}
    for each in collectives(text):
        if each.kind == "all-gather":
            gathers.update((_sizes(array.shape), each) for array in each.arrays)
    places = blueprint.shardings(mesh)
    return [
        Gathered(name, "layer" in blueprint.axes[name].split(), gathers[_sizes(shape.shape)])
        for name, shape in blueprint.shapes.items()
        if _sizes(shape.shape) in gathers
        and math.prod(shape.shape) >= 1 << 20
        and not places[name].is_fully_replicated
    ]


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In any order: XLA transposes as it likes."""
    return tuple(sorted(size for size in shape if size > 1))
