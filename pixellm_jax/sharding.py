"""Sharding rules: one table from logical axes to mesh axes, for weights and activations (FSDP).

The mesh has the axes `data`, `fsdp` and `tensor` (see `config.MeshConfig`). Weights are sharded
over `fsdp` by their width and over `tensor` by heads, MLP and vocabulary; activations over `data`
and `fsdp` by the batch and over `tensor` like the weights that produce them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pixellm_jax.axes import logical_axes
from pixellm_jax.config import MeshConfig
from pixellm_jax.errors import InputError

MESH = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

RULES: dict[str, str] = {
    "embed": "fsdp",
    "vision": "fsdp",
    "decoder": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "target": "tensor",
}
"""Logical axis -> mesh axis. An axis without a rule is not sharded.

No weight has targets: their rule is for activations (`constrain`). Where the language model shards
heads, the pixel decoder shards targets, and its small weights are gathered.
"""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh over all devices, or over `devices`, in the order that suits their network.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    rest, remainder = divmod(count, math.prod(size for size in sizes if size > 0))
    shape = tuple(rest if size < 0 else size for size in sizes)
    if remainder or math.prod(shape) != count:
        raise InputError(
            f"train.mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} do not "
            f"make {count} devices; change a size, or let one be -1"
        )
    return jax.make_mesh(shape, MESH, axis_types=(AxisType.Auto,) * len(MESH), devices=devices)


def weight_spec(axes: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the partition of a weight. An axis not divisible by its mesh axis is not sharded.

    If two axes of a weight have the same rule, it applies to the first divisible one.
    """
    used: set[str] = set()
    partition: list[str | None] = []
    for name, size in zip(logical_axes(axes), shape, strict=True):
        mesh_axis = RULES.get(name)
        if mesh_axis is None or mesh_axis in used or size % mesh.shape[mesh_axis]:
            partition.append(None)
            continue
        used.add(mesh_axis)
        partition.append(mesh_axis)
    return PartitionSpec(*partition)


def weight_sharding(axes: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return `weight_spec` bound to its mesh."""
    return NamedSharding(mesh, weight_spec(axes, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_ways(mesh: Mesh) -> int:
    """Return the number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): the share of every batch that this process reads.

    Processes that hold other parts of the same rows (`tensor`) read the same share.

    Raises:
        InputError: the rows of two processes overlap but are not the same.
    """
    ways = batch_ways(mesh)
    rows: dict[int, set[int]] = {}
    indices: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((ways,))
    for device, (row, *_) in indices.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(local_rows)) for local_rows in rows.values()})
    if sum(map(len, shares)) != ways:
        raise InputError(
            f"train.mesh: {dict(mesh.shape)} gives processes rows that overlap in part; let "
            "`tensor` divide the devices of a process, or be a multiple of them"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, axes: str) -> Array:
    """Constrain the sharding of an activation if a mesh is set (`jax.set_mesh`); else return it.

    Without this, the partitioner may shard activations by their width, like the weights, and gather
    the batch. `axes`: logical names, e.g. "batch sequence embed".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    partition: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical_axes(axes), x.shape, strict=True):
        mesh_axis = BATCH if name == "batch" else RULES.get(name)
        if mesh_axis == "fsdp" or mesh_axis is None:
            partition.append(None)
            continue
        ways = int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(mesh_axis)]))
        partition.append(mesh_axis if size % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*partition))
