"""Axis names -> places on a mesh of devices: one table of rules, for weights and activations.

The mesh has the axes `data`, `fsdp` and `tensor` (see `config.MeshConfig`). Weights are
shared out over `fsdp` by their width and over `tensor` by heads, MLP and vocabulary; activations
over `data` and `fsdp` by the batch and over `tensor` like the weights that make them.
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
"""Logical axis of a weight -> axis of the mesh; what is not here is whole on every device.

No weight has targets: they are there for activations (`constrain`). Where heads are shared out, the
pixel decoder has its targets shared out instead, and its small weights are gathered.
"""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), in the order that suits their network.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    rest, left = divmod(count, math.prod(size for size in sizes if size > 0))
    shape = tuple(rest if size < 0 else size for size in sizes)
    if left or math.prod(shape) != count:
        raise InputError(
            f"train.mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} do not "
            f"make {count} devices; change a size, or let one be -1"
        )
    return jax.make_mesh(shape, MESH, axis_types=(AxisType.Auto,) * len(MESH), devices=devices)


def weight_spec(axes: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a weight lies. An axis that its mesh axis does not divide stays whole.

    Where two axes of a weight have the same rule, the first that is divisible takes it.
    """
    taken: set[str] = set()
    places: list[str | None] = []
    for name, size in zip(logical_axes(axes), shape, strict=True):
        place = RULES.get(name)
        if place is None or place in taken or size % mesh.shape[place]:
            places.append(None)
            continue
        taken.add(place)
        places.append(place)
    return PartitionSpec(*places)


def weight_sharding(axes: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`weight_spec` on its mesh."""
    return NamedSharding(mesh, weight_spec(axes, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are shared out."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, and of how many.

    Processes that only have other parts of the same rows (`tensor`) read the same share.

    Raises:
        InputError: the rows of two processes overlap, but are not the same.
    """
    ways = batch_ways(mesh)
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((ways,))
    for device, (row, *_) in places.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(map(len, shares)) != ways:
        raise InputError(
            f"train.mesh: {dict(mesh.shape)} gives processes rows that overlap in part; let "
            "`tensor` divide the devices of a process, or be a multiple of them"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, axes: str) -> Array:
    """Pins an activation to its place, where a mesh is set (`jax.set_mesh`); else gives it back.

    Without this, the partitioner may share out activations by their width, as the weights are, and
    gather the batch. `axes`: logical names, e.g. "batch sequence embed".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    places: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical_axes(axes), x.shape, strict=True):
        place = BATCH if name == "batch" else RULES.get(name)
        if place == "fsdp" or place is None:
            places.append(None)
            continue
        ways = int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(place)]))
        places.append(place if size % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*places))
