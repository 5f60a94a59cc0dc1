"""Compiles the training step ahead of time for TPUs that are not there, and reads what it became.

libtpu compiles for a described machine ("v5e:4x4") on any host; nothing is run. What it says about
memory is the compiler's plan, which a real machine follows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from pixellm_jax.errors import InputError
from pixellm_jax.hlo import Array, Instruction, collectives, instructions
from pixellm_jax.train_state import Blueprint
from pixellm_jax.train_step import batch_spec, make_step

HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of one chip by the first word of a topology, from Google's published tables."""

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_SKIP_MDS_QUERY": "1",  # this host is no TPU VM: nobody to ask
}


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
        reason = str(error).splitlines()[0]
        raise InputError(
            f"does not fit: {reason}; more micro-batches (train.accumulation), more chips, or "
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
        own = leaf.sharding.shard_shape(leaf.shape)
        dtype = leaf.dtype.name.replace("bfloat", "bf").replace("float", "f").replace("uint", "u")
        found.append(Shard(name, Array(dtype.replace("int", "s"), leaf.shape), Array(dtype, own)))
    return sorted(found, key=lambda shard: -shard.own.bytes)


def vocabulary_gathers(text: str, vocabulary: int) -> list[Instruction]:
    """All-gathers that put the whole vocabulary on one chip."""
    return [
        each
        for each in collectives(text)
        if each.kind == "all-gather" and any(vocabulary in a.shape for a in each.arrays)
    ]


def whole_parameters(text: str, state: Any) -> list[tuple[Shard, Instruction]]:
    """Arrays of the program as large as a whole parameter that is shared out over chips.

    One instruction for each parameter. Layers are stacked, so that one layer of many is no match.
    """
    sizes: dict[int, Instruction] = {}
    for each in instructions(text):
        if each.kind in ("parameter", "tuple", "while", "get-tuple-element"):
            continue
        for array in each.arrays:
            sizes.setdefault(math.prod(array.shape), each)
    return [
        (shard, sizes[math.prod(shard.whole.shape)])
        for shard in shards(state)
        if shard.own.shape != shard.whole.shape and math.prod(shard.whole.shape) in sizes
    ]
