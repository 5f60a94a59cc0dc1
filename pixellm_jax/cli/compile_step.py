"""`pixellm compile`: compile a recipe's training step for TPUs without a TPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
from jax.sharding import Mesh

from pixellm_jax.cli.console import format_table
from pixellm_jax.cli.options import add_recipe_option
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe, read_recipe
from pixellm_jax.perf.aot import (
    HBM_GIB,
    CompiledStep,
    GatherReport,
    Shard,
    check_gathers,
    compile_step,
    shards,
    topology_devices,
)
from pixellm_jax.perf.hlo import collectives, traffic
from pixellm_jax.sharding import make_mesh
from pixellm_jax.training.state import make_blueprint

GIB = 2**30

LARGEST_ARRAYS = 8
"""Rows of the table of arrays."""

EXAMPLES = """examples:
  pixellm compile --config configs/pixellm_7b.py --topology v5e:4x4
  pixellm compile --config configs/pixellm_7b.py --topology v5e:8x8 --config.train.mesh.tensor=4

Needs `pip install 'pixellm_jax[tpu]'`, but no TPU. JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0 compiles
several times faster, but to another program, whose memory differs by a few percent.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser.description = (
        "Compiles the training step of a recipe for the chips of a TPU topology, and "
        "prints the memory per chip, the largest arrays and the traffic between chips."
    )
    parser.epilog = EXAMPLES
    add_recipe_option(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="generation and chips, such as v5e:4x4"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="write the compiled program (HLO) to a file"
    )


def run(options: argparse.Namespace) -> None:
    """Compile the step and print its cost.

    Raises:
        InputError: the step does not fit, or a chip would hold what must stay sharded.
    """
    jax.config.update("jax_platforms", "cpu")  # keeps JAX from looking for a TPU
    recipe, _ = read_recipe(options.config, options.overrides)
    mesh = make_mesh(recipe.train.mesh, topology_devices(options.topology))
    blueprint = make_blueprint(recipe.model, recipe.train)
    data = recipe.data
    print(_heading(options.topology, mesh, recipe), flush=True)
    compiled = compile_step(
        blueprint,
        mesh,
        batch=data.batch,
        length=data.length,
        targets=data.targets,
        masks=data.masks or recipe.model.vision.canvas,
    )
    if options.text is not None:
        options.text.write_text(compiled.text, encoding="utf-8")
    print(_memory(options.topology, compiled))
    print("", _arrays(shards(blueprint.state(mesh))[:LARGEST_ARRAYS]), sep="\n")
    print("", _traffic(compiled.text), sep="\n")
    print()
    _print_gathers(check_gathers(compiled.text, blueprint, mesh), tensor=mesh.shape["tensor"])


def _heading(topology: str, mesh: Mesh, recipe: Recipe) -> str:
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    data = recipe.data
    return (
        f"{topology}: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}\n"
        f"{data.batch} images in {recipe.train.accumulation} micro-batches, {data.length} "
        f"positions and {data.targets} targets each"
    )


def _memory(topology: str, compiled: CompiledStep) -> str:
    arguments, temporaries, peak = (size / GIB for size in compiled.memory)
    hbm = HBM_GIB.get(topology.partition(":")[0])
    limit = f" of {hbm} GiB ({peak / hbm:.0%})" if hbm else ""
    return (
        f"compiled in {compiled.seconds:.0f} s\n"
        f"per chip: {arguments:.2f} GiB of state and batch, {temporaries:.2f} GiB of temporaries; "
        f"at most {peak:.2f} GiB{limit}"
    )


def _arrays(arrays: list[Shard]) -> str:
    rows = [["largest arrays", "global", "per chip", "MiB"]]
    rows += [
        [shard.name, str(shard.full), str(shard.local), f"{shard.local.bytes / 2**20:.0f}"]
        for shard in arrays
    ]
    return format_table(rows, names=1)


def _traffic(text: str) -> str:
    rows = [["collectives per step", "in the program", "runs", "GiB per chip"]]
    for kind, sums in traffic(collectives(text)).items():
        rows.append([kind, str(sums.instructions), str(sums.runs), f"{sums.bytes / GIB:.2f}"])
    return format_table(rows, names=1)


def _print_gathers(report: GatherReport, *, tensor: int) -> None:
    """Print what is gathered in full, and refuse what must stay sharded."""
    names = [
        f"{parameter.name} ({parameter.gather.bytes / 2**20:.0f} MiB)"
        for parameter in report.parameters
    ]
    print("gathered in full, one at a time:", ", ".join(names) or "no large parameter")
    if report.faults:
        raise InputError(f"gathered in full on every chip: {'; '.join(report.faults)}")
    print("gathered nowhere: a stack of layers" + (", the vocabulary" if tensor > 1 else ""))
    if tensor == 1:
        print("mesh.tensor is 1: the vocabulary is not sharded, the head is used in full")
