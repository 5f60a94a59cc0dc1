"""`pixellm compile`: a recipe's training step, compiled for TPUs without a TPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pixellm_jax.cli.console import format_table
from pixellm_jax.cli.options import add_recipe_option
from pixellm_jax.errors import InputError
from pixellm_jax.experiments.recipe import Recipe, read_recipe
from pixellm_jax.perf import aot
from pixellm_jax.perf.hlo import collectives, traffic
from pixellm_jax.sharding import batch_ways, make_mesh
from pixellm_jax.training.state import Blueprint, make_blueprint

GIB = 2**30

EXAMPLES = """examples:
  pixellm compile --config configs/pixellm_7b.py --topology v5e:4x4
  pixellm compile --config configs/pixellm_7b.py --topology v5e:8x8 --config.train.mesh.tensor=4

Needs `pip install 'pixellm_jax[tpu]'` and no TPU. JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0 compiles
several times faster, to another program: memory differs by some percent.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compile",
        help="compile a training step for TPUs, without one",
        description="Compiles the training step of a recipe for the chips of a TPU topology, and "
        "prints the memory of a chip, its largest arrays and what chips send each other.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_option(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="generation and chips, such as v5e:4x4"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="keep the compiled program")
    return parser


def run(options: argparse.Namespace) -> None:
    """Compiles and prints.

    Raises:
        InputError: the step does not fit, or a chip would hold what is to be shared out.
    """
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the TPU that is not there
    recipe, _ = read_recipe(options.config, options.overrides)
    mesh = make_mesh(recipe.train.mesh, aot.describe(options.topology))
    ways = batch_ways(mesh) * recipe.train.accumulation
    if recipe.data.batch % ways:
        raise InputError(
            f"data.batch={recipe.data.batch} is no multiple of {ways} (mesh data x fsdp x "
            "train.accumulation); change one of them, as in --config.data.batch=64"
        )
    blueprint = make_blueprint(recipe.model, recipe.train)
    data = recipe.data
    print(_heading(options.topology, mesh, recipe), flush=True)
    compiled = aot.compile_step(
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
    print("", _arrays(aot.shards(blueprint.state(mesh))[:8]), sep="\n")
    print("", _traffic(compiled.text), sep="\n")
    print()
    _check(compiled.text, blueprint, mesh)


def _heading(topology: str, mesh: Mesh, recipe: Recipe) -> str:
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    data, train = recipe.data, recipe.train
    return (
        f"{topology}: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}\n"
        f"{data.batch} images in {train.accumulation} micro-batches, {data.length} positions and "
        f"{data.targets} targets each"
    )


def _memory(topology: str, compiled: aot.Compiled) -> str:
    arguments, temporaries, peak = (part / GIB for part in compiled.memory)
    hbm = aot.HBM_GIB.get(topology.partition(":")[0])
    limit = f" of {hbm} GiB ({peak / hbm:.0%})" if hbm else ""
    return (
        f"compiled in {compiled.seconds:.0f} s\n"
        f"per chip: {arguments:.2f} GiB of state and batch, {temporaries:.2f} GiB beside them; at "
        f"most {peak:.2f} GiB{limit}"
    )


def _arrays(found: list[aot.Shard]) -> str:
    rows = [["largest arrays", "whole", "per chip", "MiB"]]
    rows += [[s.name, str(s.whole), str(s.own), f"{s.own.bytes / 2**20:.0f}"] for s in found]
    return format_table(rows, names=1)


def _traffic(text: str) -> str:
    rows = [["collectives per step", "in the program", "runs", "GiB made per chip"]]
    for kind, sums in traffic(collectives(text)).items():
        rows.append([kind, str(sums.instructions), str(sums.runs), f"{sums.bytes / GIB:.2f}"])
    return format_table(rows, names=1)


def _check(text: str, blueprint: Blueprint, mesh: Mesh) -> None:
    """Prints what is gathered whole, and refuses what never should be."""
    found = aot.gathered_parameters(text, blueprint, mesh)
    single = [f"{g.name} ({g.gather.bytes / 2**20:.0f} MiB)" for g in found if not g.stacked]
    print("whole on a chip, each in its turn:", ", ".join(single) or "no large parameter")
    faults = [f"all layers of {g.name} at {g.gather.origin}" for g in found if g.stacked]
    shared = mesh.shape["tensor"] > 1
    if shared:
        gathers = aot.vocabulary_gathers(text, blueprint.config.language.vocabulary)
        faults += [f"the vocabulary, {g.arrays[0]}, at {g.origin}" for g in gathers]
    if faults:
        raise InputError(f"gathered whole on every chip: {'; '.join(faults)}")
    print("gathered nowhere: a stack of layers" + (", the vocabulary" if shared else ""))
    if not shared:
        print("mesh.tensor is 1: ids are not shared out, the head is whole where it is multiplied")
