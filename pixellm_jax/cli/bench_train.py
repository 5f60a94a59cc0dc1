"""`pixellm bench train`: seconds, operations and memory of a training step."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pixellm_jax.batch import Batch, make_row, stack_rows
from pixellm_jax.cli.console import format_table
from pixellm_jax.config import SIZES, MeshConfig, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.model import flops
from pixellm_jax.perf import baseline
from pixellm_jax.perf.host_memory import keep_freed_memory
from pixellm_jax.perf.parts import parts_of_a_step
from pixellm_jax.perf.sizes import BENCH_SIZES
from pixellm_jax.sharding import batch_sharding, make_mesh
from pixellm_jax.text.prompt import IMAGE_TOKEN, Conversation, pack
from pixellm_jax.training.config import LossConfig, TrainConfig
from pixellm_jax.training.log import memory_bytes
from pixellm_jax.training.state import Blueprint, initial_state, make_blueprint
from pixellm_jax.training.step import make_step

PROMPT, QUESTION, ANSWER = 40, 30, 4
"""Ids before and around the image, of a question, and of an answer beside its codebook tokens."""

RECIPES = {
    "all": TrainConfig(
        lora=None,
        trainable=(
            "language_model",
            "image_projector",
            "mask_projector",
            "codebook",
            "pixel_decoder",
        ),
        frozen=("vision_encoder",),
        loss=LossConfig(alpha=1.0),
    ),
    "paper": TrainConfig(),
}

EXAMPLES = """examples:
  pixellm bench train --size ref47m --peer
  pixellm bench train --size 7b --batch 8 --questions 6 --parts

One answer of one target to every question; 40 prompt ids, 30 ids a question, 4 + N L an answer. A
step is forward, backward and update. MFU: matrix products of the step (flops.py) against a measured
one. The recipe "all" trains all but the vision encoder, "paper" with LoRA. The peer is LLaVA of
transformers, forward and backward alone, a row for every question, as the released code does it.
"""


class Times(NamedTuple):
    """Seconds of the runs of one thing, after a first one that is not counted."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> str:
        return f"{min(self.runs):.3f}-{max(self.runs):.3f}"


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "train",
        help="a training step",
        description="Times training steps on random pictures and conversations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=BENCH_SIZES, default="ref47m")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="what is trained (default: paper for 7b and 13b, else all)",
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 3, 6], metavar="N")
    parser.add_argument("--batch", type=int, default=2, metavar="IMAGES")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed runs of each")
    parser.add_argument("--parts", action="store_true", help="time the parts of the step, too")
    parser.add_argument(
        "--peer", action="store_true", help="compare with LLaVA of transformers in the same run"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Times one row after the other and prints the table.

    Raises:
        InputError: a number below 1, a batch that the devices cannot share, or --peer without a
            PyTorch for this device.
    """
    for name in ("batch", "repeat"):
        if getattr(options, name) < 1 or min(options.questions) < 1:
            raise InputError("--questions, --batch and --repeat must be at least 1")
    keep_freed_memory()
    config, size = BENCH_SIZES[options.size], options.size
    recipe = options.recipe or ("paper" if size in SIZES else "all")
    devices = jax.device_count()
    if options.batch % devices:
        raise InputError(f"--batch {options.batch}: no multiple of the {devices} devices here")
    if options.peer and recipe != "all":
        raise InputError("--peer trains all but CLIP: compare it with --recipe all")
    if options.peer and devices > 1 and jax.default_backend() != "cpu":
        raise InputError(f"--peer runs on one device, this on {devices}; let one be seen")
    peer = baseline.make_peer(config) if options.peer else None
    blueprint = make_blueprint(config, RECIPES[recipe])
    print(_heading(size, recipe, blueprint), flush=True)
    head = ["questions", "seconds", "spread", "examples/s", "tokens/s"]
    rows = [[*head, "TFLOP", "TFLOP/s", "MFU", "compiled in s", "GiB planned", "GiB at most"]]
    if peer is not None:
        rows[0] += ["LLaVA: seconds", "spread", "ours is faster by"]
    broken_down: list[str] = []
    for questions in options.questions:
        batch = random_batch(config, images=options.batch, questions=questions)
        rows.append([questions, *_row(blueprint, batch, options.repeat, peer)])
        print(f"{questions} per image: {rows[-1][1]} s", flush=True)
        if options.parts:
            broken_down += ["", _parts(blueprint, batch, questions, options.repeat)]
    print("", format_table(rows, names=0), *broken_down, sep="\n")


def random_batch(config: ModelConfig, *, images: int, questions: int) -> Batch:
    """Random pictures (the lower quarter is padding), conversations and masks, always the same."""
    draw, codebook = np.random.default_rng(0), config.codebook
    codes = codebook.scales * codebook.tokens_per_scale
    words = config.language.vocabulary - codes - 2  # as the released tokenizer ends: <im_start> ...
    prompt = draw.integers(3, words, PROMPT)
    conversations = []
    for _ in range(questions):
        text = draw.integers(3, words, QUESTION + ANSWER)
        ids = np.concatenate(
            [prompt[:-1], [IMAGE_TOKEN], prompt[-1:], text, words + np.arange(codes)]
        )
        supervised = np.arange(len(ids)) > PROMPT + QUESTION
        places = np.arange(len(ids) - codes, len(ids), dtype=np.int32)
        groups = places.reshape(1, codebook.scales, codebook.tokens_per_scale)
        conversations.append(Conversation(ids.astype(np.int32), supervised, groups))
    packed = pack(conversations, image_tokens=config.image_tokens)
    canvas = config.vision.canvas
    pictures = draw.integers(0, 256, (images, canvas, canvas, 3), np.uint8)
    masks = draw.integers(0, 2, (images, questions, canvas, canvas), np.uint8)
    hw = (canvas * 3 // 4, canvas)
    return stack_rows(
        [
            make_row(packed, image=picture, image_hw=hw, masks=truth)
            for picture, truth in zip(pictures, masks, strict=True)
        ]
    )


def timed(call: Callable[[], Any], repeat: int) -> Times:
    """Calls once more than `repeat`; `call` is to return what it waits for."""
    (times,) = timed_in_turns([call], repeat)
    return times


def timed_in_turns(calls: Sequence[Callable[[], Any]], repeat: int) -> list[Times]:
    """The same for several, one after the other in every round."""
    for call in calls:
        jax.block_until_ready(call())
    runs: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, own in zip(calls, runs, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            own.append(time.perf_counter() - begin)
    return [Times(tuple(own)) for own in runs]


def _heading(size: str, recipe: str, blueprint: Blueprint) -> str:
    device, config = jax.devices()[0], blueprint.config
    counts = {name: int(np.prod(shape.shape)) for name, shape in blueprint.shapes.items()}
    trained = sum(counts[name] for name in blueprint.trainable)
    peak, bandwidth = flops.matmul_peak(config.dtype), flops.copy_bandwidth()
    return (
        f"{size}: {sum(counts.values()) / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained "
        f"(recipe {recipe}), {config.dtype}\n"
        f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}: "
        f"{peak / 1e12:.3f} TFLOP/s in a matrix product, {bandwidth / 1e9:.1f} GB/s copied"
    )


def _row(blueprint: Blueprint, batch: Batch, repeat: int, peer: Any) -> Sequence[str]:
    config = blueprint.config
    mesh = make_mesh(MeshConfig())
    batch = jax.device_put(batch, batch_sharding(mesh))
    (images, length), targets = batch.tokens.shape, batch.target_valid.shape[1]
    begin = time.perf_counter()
    jitted: Any = make_step(blueprint, mesh)
    step = jitted.lower(blueprint.state(mesh), batch).compile()
    compiling = time.perf_counter() - begin
    state = initial_state(blueprint, mesh, None)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    calls: list[Callable[[], Any]] = [call]
    if peer is not None:
        codes = config.codebook.scales * config.codebook.tokens_per_scale
        said = ANSWER + codes
        whole = PROMPT + config.image_tokens + QUESTION + said
        calls.append(baseline.train(peer, rows=images * targets, length=whole, supervised=said))
    times, *beside = timed_in_turns(calls, repeat)
    plan = step.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes
    planned -= plan.alias_size_in_bytes
    work = flops.train_flops(
        config, blueprint.trainable, images=images, length=length, targets=targets
    )
    seconds, peak = times.median, flops.matmul_peak(config.dtype) * mesh.size
    return (
        f"{seconds:.3f}",
        times.spread,
        f"{images / seconds:.2f}",
        f"{images * length / seconds:.0f}",
        f"{work / 1e12:.3f}",
        f"{work / seconds / 1e12:.3f}",
        f"{work / seconds / peak:.0%}",
        f"{compiling:.1f}",
        f"{planned / 2**30:.2f}",
        "" if beside else f"{memory_bytes() / 2**30:.2f}",  # of the peer, too
        *(
            cell
            for peers in beside
            for cell in (f"{peers.median:.3f}", peers.spread, f"{peers.median / seconds:.1f}")
        ),
    )


def _parts(blueprint: Blueprint, batch: Batch, questions: int, repeat: int) -> str:
    """The table of the parts of a step at one row of the first table."""
    rows = [["part", "seconds", "spread", "TFLOP", "TFLOP/s"]]
    for part in parts_of_a_step(blueprint, batch):
        times = timed(part.call, repeat)
        speed = f"{part.flops / times.median / 1e12:.3f}" if part.flops else ""
        work = f"{part.flops / 1e12:.3f}" if part.flops else ""
        rows.append([part.name, f"{times.median:.3f}", times.spread, work, speed])
    return f"{questions} per image\n" + format_table(rows, names=1)
