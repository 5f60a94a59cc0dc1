"""Ahead-of-time compilation of the training step for TPUs that are absent.

libtpu compiles for a described topology ("v5e:4x4") on any host; nothing runs. Memory figures are
the compiler's plan, which a real machine follows.
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
from pixellm_jax.sharding import batch_ways
from pixellm_jax.training.state import Blueprint
from pixellm_jax.training.step import batch_spec, make_step

HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of one chip by TPU generation, from Google's published tables."""

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    "TPU_SKIP_MDS_QUERY": "1",  # this host is no TPU VM: there is no metadata server
    "TPU_STDERR_LOG_LEVEL": "3",  # libtpu logs the missing server on standard error
    "TPU_MIN_LOG_LEVEL": "3",
}

XLA_NAMES = {"bfloat": "bf", "float": "f", "int": "s", "uint": "u", "bool": "pred"}
"""XLA's names of dtypes by NumPy's, both without the size."""


class ChipMemory(NamedTuple):
    """Planned memory of one chip in bytes.

    Attributes:
        arguments: the training state and the batch.
        temporaries: everything else that the step allocates.
        peak: largest sum in use at once.
    """

    arguments: int
    temporaries: int
    peak: int


class CompiledStep(NamedTuple):
    """A compiled training step.

    Attributes:
        seconds: compilation time.
        memory: planned memory of one chip.
        text: the program of one chip, as HLO text.
    """

    seconds: float
    memory: ChipMemory
    text: str


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Return the devices of a topology such as "v5e:4x4" (chips along x and y).

    Raises:
        InputError: libtpu is not installed, or does not know the topology.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except RuntimeError as error:  # includes JaxRuntimeError
        reason = str(error).splitlines()[0]
        if "not installed" in reason:
            raise InputError(
                "libtpu is not installed: pip install 'pixellm_jax[tpu]' (with JAX's own [tpu])"
            ) from None
        raise InputError(
            f"--topology {topology}: {reason}; name a generation and its chips, as in v5e:4x4"
        ) from None
    return description.devices


def compile_step(
    blueprint: Blueprint, mesh: Mesh, *, batch: int, length: int, targets: int, masks: int
) -> CompiledStep:
    """Compile the training step for the devices of `mesh`.

    Args:
        blueprint: model, trained parameters and optimizer.
        mesh: mesh of `topology_devices`.
        batch: images of the global batch.
        length: sequence positions per image.
        targets: target slots per image.
        masks: side of the masks in pixels.

    Raises:
        InputError: the batch does not divide among micro-batches and chips, or the step does not
            fit into the memory of the chips.
    """
    ways = batch_ways(mesh) * blueprint.train.accumulation
    if batch % ways:
        raise InputError(
            f"data.batch={batch} is no multiple of {ways} (mesh data x fsdp x "
            "train.accumulation); change one of them, as in --config.data.batch=64"
        )
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
    seconds = time.perf_counter() - begin
    plan = compiled.memory_analysis()
    return CompiledStep(
        seconds=seconds,
        memory=ChipMemory(
            arguments=plan.argument_size_in_bytes,
            temporaries=plan.temp_size_in_bytes,
            peak=plan.peak_memory_in_bytes,
        ),
        text=compiled.as_text(),
    )


class Shard(NamedTuple):
    """One array of the training state.

    Attributes:
        name: path in the state.
        full: the array on all chips together.
        local: the part on one chip.
    """

    name: str
    full: Array
    local: Array


def shards(state: Any) -> list[Shard]:
    """Return the arrays of a state of shapes and shardings, the largest per chip first."""
    result = []
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        dtype = re.sub("^[a-z]+", lambda kind: XLA_NAMES[kind.group()], leaf.dtype.name)
        local = leaf.sharding.shard_shape(leaf.shape)
        result.append(Shard(name, Array(dtype, leaf.shape), Array(dtype, local)))
    return sorted(result, key=lambda shard: -shard.local.bytes)


def vocabulary_gathers(text: str, vocabulary: int) -> list[Instruction]:
    """Return the all-gathers that materialise the full vocabulary on one chip."""
    return [
        instruction
        for instruction in collectives(text)
        if instruction.kind == "all-gather"
        and any(vocabulary in array.shape for array in instruction.arrays)
    ]


class GatheredParameter(NamedTuple):
    """A sharded parameter that an all-gather materialises in full on every chip.

    Attributes:
        name: dotted name.
        stacked: all layers of a stack are gathered at once.
        gather: the all-gather.
    """

    name: str
    stacked: bool
    gather: Instruction


def gathered_parameters(text: str, blueprint: Blueprint, mesh: Mesh) -> list[GatheredParameter]:
    """Return the parameters of at least 2^20 elements that an all-gather materialises in full.

    Parameters are identified by shape, so parameters of equal shape are reported together. A single
    layer of a stack has another shape than the stack; it is gathered in its turn and not listed.
    """
    gathers: dict[tuple[int, ...], Instruction] = {}
    for instruction in collectives(text):
        if instruction.kind == "all-gather":
            gathers.update((_sizes(array.shape), instruction) for array in instruction.arrays)
    shardings = blueprint.shardings(mesh)
    return [
        GatheredParameter(
            name, "layer" in blueprint.axes[name].split(), gathers[_sizes(shape.shape)]
        )
        for name, shape in blueprint.shapes.items()
        if _sizes(shape.shape) in gathers
        and math.prod(shape.shape) >= 1 << 20
        and not shardings[name].is_fully_replicated
    ]


class GatherReport(NamedTuple):
    """All-gathers of a compiled step.

    Attributes:
        parameters: large parameters that are materialised in full, one at a time.
        faults: descriptions of what must stay sharded and is materialised in full: a stack of
            layers, or the vocabulary on a mesh with tensor parallelism.
    """

    parameters: list[GatheredParameter]
    faults: list[str]


def check_gathers(text: str, blueprint: Blueprint, mesh: Mesh) -> GatherReport:
    """Return what the compiled step gathers, and which of it is a fault."""
    gathered = gathered_parameters(text, blueprint, mesh)
    faults = [
        f"all layers of {parameter.name} at {parameter.gather.origin}"
        for parameter in gathered
        if parameter.stacked
    ]
    if mesh.shape["tensor"] > 1:
        faults += [
            f"the vocabulary, {gather.arrays[0]}, at {gather.origin}"
            for gather in vocabulary_gathers(text, blueprint.config.language.vocabulary)
        ]
    return GatherReport([p for p in gathered if not p.stacked], faults)


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes above 1, sorted: XLA transposes freely."""
    return tuple(sorted(size for size in shape if size > 1))
