"""`pixellm bench`: measure the speed and memory of training or generation on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.cli.console import HelpFormatter, format_table
from pixellm_jax.config import DTYPES, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model import flops
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.perf.baseline import make_baseline
from pixellm_jax.perf.decoding import (
    MIN_SENTENCES,
    PRECISIONS,
    BaselineMeasurement,
    DecodingMeasurement,
    load_reciting,
    measure_decoding,
)
from pixellm_jax.perf.parts import PartMeasurement, measure_parts
from pixellm_jax.perf.sizes import BENCH_SIZES
from pixellm_jax.perf.train_step import (
    RECIPES,
    StepMeasurement,
    default_recipe,
    measure_step,
    random_batch,
)
from pixellm_jax.training.memory import keep_freed_memory
from pixellm_jax.training.state import Blueprint, make_blueprint
from pixellm_jax.weights import checkpoint

TRAIN_EXAMPLES = """examples:
  pixellm bench train --size ref47m --peer
  pixellm bench train --size 7b --batch 8 --questions 6 --parts

Every question has an answer with one target: 40 prompt ids, 30 ids per question, 4 + N L ids per
answer. A step is forward, backward and update. MFU divides the FLOPs of the step's matrix products
by the measured speed of a matrix product. The recipe "all" trains everything but the vision
encoder, "paper" trains with LoRA. --peer times LLaVA of transformers, forward and backward only,
with one row per question, as the released code of PixelLM does.
"""

GENERATE_EXAMPLES = """examples:
  pixellm bench generate --size ref47m --batch 1 4 16 64
  pixellm bench generate --size ref47m --batch 1 16 --precision float32 bfloat16 --peer

A prompt has 40 ids, an image of its own and 30 ids. An answer repeats one sentence: 10 ids and the
codebook tokens of a target, read one by one or at once (jump-forward decoding); the engine itself
chooses by batch size. Prefill encodes images and prompts. A step runs all rows through the language
model once and reads its weights, keys and values; "of copy" compares this traffic with the measured
bandwidth of a copy. tokens/s is the speed while decoding, without prefill and masks; "total s"
includes everything.
"""

TRAIN_HEAD = (
    "questions",
    "seconds",
    "spread",
    "examples/s",
    "tokens/s",
    "TFLOP",
    "TFLOP/s",
    "MFU",
    "compile s",
    "planned GiB",
    "peak GiB",
)
TRAIN_BASELINE_HEAD = ("LLaVA seconds", "spread", "speedup")
PARTS_HEAD = ("part", "seconds", "spread", "TFLOP", "TFLOP/s")
GENERATE_HEAD = (
    "precision",
    "rows",
    "codebook tokens",
    "prefill s",
    "ms/step",
    "spread",
    "steps",
    "tokens/s",
    "masks/s",
    "total s",
    "MB/step",
    "of copy",
    "compiled",
    "peak GiB",
)
GENERATE_BASELINE_HEAD = (
    "precision",
    "rows",
    "LLaVA",
    "prefill s",
    "ms/token",
    "spread",
    "tokens/s",
    "speedup one by one",
    "speedup at once",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command and its two benchmarks."""
    parser.description = "Measures with random weights and data; writes no files."
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_train_parser(kinds).set_defaults(measure=bench_train)
    _add_generate_parser(kinds).set_defaults(measure=bench_generate)


def run(options: argparse.Namespace) -> None:
    """Run the chosen benchmark."""
    options.measure(options)


def bench_train(options: argparse.Namespace) -> None:
    """Time training steps and print the tables.

    Raises:
        InputError: a number below 1, a batch that does not divide among the devices, or --peer
            without a PyTorch for this device.
    """
    if min(options.batch, options.repeat, *options.questions) < 1:
        raise InputError("--questions, --batch and --repeat must be at least 1")
    keep_freed_memory()
    config = BENCH_SIZES[options.size]
    recipe = options.recipe or default_recipe(options.size)
    devices = jax.device_count()
    if options.batch % devices:
        raise InputError(f"--batch {options.batch} is no multiple of the {devices} devices here")
    if options.peer and recipe != "all":
        raise InputError("--peer trains everything but CLIP: compare it with --recipe all")
    if options.peer and devices > 1 and jax.default_backend() != "cpu":
        raise InputError(f"--peer runs on one device, found {devices}; make only one visible")
    baseline = make_baseline(config) if options.peer else None
    blueprint = make_blueprint(config, RECIPES[recipe])
    print(_train_heading(options.size, recipe, blueprint), flush=True)
    rows: list[Sequence[object]] = [[*TRAIN_HEAD, *(TRAIN_BASELINE_HEAD if options.peer else ())]]
    part_tables: list[str] = []
    for questions in options.questions:
        batch = random_batch(config, images=options.batch, questions=questions)
        step = measure_step(blueprint, batch, repeat=options.repeat, baseline=baseline)
        rows.append([questions, *_step_cells(step)])
        print(f"{questions} per image: {step.timing.median:.3f} s", flush=True)
        if options.parts:
            parts = [_part_cells(p) for p in measure_parts(blueprint, batch, repeat=options.repeat)]
            part_tables += [
                "",
                f"{questions} per image",
                format_table([PARTS_HEAD, *parts], names=1),
            ]
    print("", format_table(rows, names=0), *part_tables, sep="\n")


def bench_generate(options: argparse.Namespace) -> None:
    """Time answers and print the tables.

    Raises:
        InputError: a number that is too small or too large for the model, or --peer without a
            PyTorch for this device.
    """
    if min(*options.batch, options.repeat) < 1 or options.masks < MIN_SENTENCES:
        raise InputError(
            f"--batch and --repeat must be at least 1, --masks at least {MIN_SENTENCES}"
        )
    folder = options.checkpoint
    base = BENCH_SIZES[options.size] if folder is None else checkpoint.read_config(folder)
    rows: list[Sequence[object]] = [GENERATE_HEAD]
    baseline_rows: list[Sequence[object]] = [GENERATE_BASELINE_HEAD]
    for precision in options.precision or [base.dtype]:
        compute = precision in DTYPES
        config = dataclasses.replace(base, dtype=precision) if compute else base
        baseline = make_baseline(config) if options.peer and compute else None
        model, vocabulary = load_reciting(precision, config, folder=folder, tokenizer=FOLDER)
        if len(rows) == 1:
            print(_generate_heading(model), flush=True)
        for batch in options.batch:
            engine, others = measure_decoding(
                model,
                vocabulary,
                rows=batch,
                sentences=options.masks,
                repeat=options.repeat,
                baseline=baseline,
                recompute=batch == min(options.batch),
            )
            rows += [[precision, batch, *_decoding_cells(measured)] for measured in engine]
            baseline_rows += [
                [precision, batch, *_baseline_cells(measured, engine)] for measured in others
            ]
            print(f"{precision}, {batch} rows: {1e3 * engine[0].step:.2f} ms/step", flush=True)
    print("", format_table(rows, names=1), sep="\n")
    if len(baseline_rows) > 1:
        print("", format_table(baseline_rows, names=1), sep="\n")


def _add_train_parser(kinds: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "train",
        help="a training step",
        description="Times training steps on random images and conversations.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--size", choices=BENCH_SIZES, default="ref47m")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="which parameters are trained (default: paper for 7b and 13b, else all)",
    )
    parser.add_argument(
        "--questions",
        type=int,
        nargs="+",
        default=[1, 3, 6],
        metavar="N",
        help="questions per image (1 3 6)",
    )
    parser.add_argument(
        "--batch", type=int, default=2, metavar="IMAGES", help="images per step (2)"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed runs (5)")
    parser.add_argument("--parts", action="store_true", help="time the parts of the step, too")
    parser.add_argument(
        "--peer", action="store_true", help="compare with LLaVA of transformers in the same run"
    )
    return parser


def _add_generate_parser(kinds: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "generate",
        help="answers, with their masks",
        description="Times answers of a known length to questions about random images.",
        epilog=GENERATE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--size", choices=BENCH_SIZES, default="ref47m")
    source.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="use the layers of a trained model"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="batch sizes (1 16)"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="compute dtypes or weight formats (the dtype of the model)",
    )
    parser.add_argument("--masks", type=int, default=6, metavar="N", help="masks per answer (6)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs (3)")
    parser.add_argument(
        "--peer", action="store_true", help="compare with LLaVA of transformers in the same run"
    )
    return parser


def _train_heading(size: str, recipe: str, blueprint: Blueprint) -> str:
    config = blueprint.config
    counts = {name: int(np.prod(shape.shape)) for name, shape in blueprint.shapes.items()}
    trained = sum(counts[name] for name in blueprint.trainable)
    return (
        f"{size}: {sum(counts.values()) / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained "
        f"(recipe {recipe}), {config.dtype}\n"
        f"{jax.device_count()} x {_machine((config.dtype,))}"
    )


def _generate_heading(model: PixelLM) -> str:
    count = sum(variable.size for _, variable in nnx.to_flat_state(nnx.state(model)))
    config: ModelConfig = model.config
    return f"{count / 1e6:.1f} M parameters, canvas {config.vision.canvas}\n{_machine(DTYPES)}"


def _machine(dtypes: Sequence[str]) -> str:
    """Describe the device by its measured speed."""
    peaks = ", ".join(f"{flops.matmul_peak(dtype) / 1e12:.3f} in {dtype}" for dtype in dtypes)
    return (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {peaks} TFLOP/s in a matrix "
        f"product, {flops.copy_bandwidth() / 1e9:.1f} GB/s copied"
    )


def _step_cells(step: StepMeasurement) -> list[str]:
    # With a baseline in this process its memory would be counted, too.
    peak = f"{step.peak_bytes / 2**30:.2f}" if step.baseline is None else ""
    cells = [
        f"{step.timing.median:.3f}",
        step.timing.spread,
        f"{step.examples_per_second:.2f}",
        f"{step.tokens_per_second:.0f}",
        f"{step.flops / 1e12:.3f}",
        f"{step.flops_per_second / 1e12:.3f}",
        f"{step.mfu:.0%}",
        f"{step.compile_seconds:.1f}",
        f"{step.planned_bytes / 2**30:.2f}",
        peak,
    ]
    if step.baseline is not None:
        speedup = step.baseline.median / step.timing.median
        cells += [f"{step.baseline.median:.3f}", step.baseline.spread, f"{speedup:.1f}"]
    return cells


def _part_cells(part: PartMeasurement) -> list[str]:
    seconds = part.timing.median
    work = f"{part.flops / 1e12:.3f}" if part.flops else ""
    speed = f"{part.flops / seconds / 1e12:.3f}" if part.flops else ""
    return [part.name, f"{seconds:.3f}", part.timing.spread, work, speed]


def _decoding_cells(measured: DecodingMeasurement) -> list[str]:
    return [
        measured.mode,
        f"{measured.prefill:.3f}",
        f"{1e3 * measured.step:.2f}",
        _milliseconds([run.step for run in measured.runs]),
        f"{measured.steps}",
        f"{measured.tokens_per_second:.1f}",
        f"{measured.masks_per_second:.1f}",
        f"{measured.total:.3f}",
        f"{measured.bytes_per_step / 1e6:.1f}",
        f"{measured.bytes_per_second / flops.copy_bandwidth():.0%}",
        f"{measured.compiled}",
        f"{measured.peak_bytes / 2**30:.2f}",
    ]


def _baseline_cells(
    measured: BaselineMeasurement, engine: Sequence[DecodingMeasurement]
) -> list[str]:
    speed = measured.tokens_per_second
    return [
        measured.mode,
        f"{measured.prefill:.3f}",
        f"{1e3 * measured.step:.2f}",
        _milliseconds([run.step for run in measured.runs]),
        f"{speed:.1f}",
        *(f"{own.tokens_per_second / speed:.2f}" for own in engine),
    ]


def _milliseconds(seconds: Sequence[float]) -> str:
    """Return smallest and largest value, such as "3.45-3.67"."""
    return f"{1e3 * min(seconds):.2f}-{1e3 * max(seconds):.2f}"
