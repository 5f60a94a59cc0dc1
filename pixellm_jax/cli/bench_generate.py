"""`pixellm bench generate`: seconds, bytes and memory of answering, and of other code beside it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
from flax import nnx

from data_pipeline.sources.shapes.tokenizer import FOLDER
from pixellm_jax.cli.bench_recital import random_model, recital, recite, sentence
from pixellm_jax.cli.console import format_table
from pixellm_jax.config import DTYPES, ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import WEIGHTS, serve
from pixellm_jax.inference.request import Question
from pixellm_jax.model import flops
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.perf import baseline
from pixellm_jax.perf.baseline import PeerRun
from pixellm_jax.perf.sizes import BENCH_SIZES
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.log import memory_bytes
from pixellm_jax.weights import checkpoint

PRECISIONS = (*DTYPES, *WEIGHTS)

LOOK = 8
"""Passes between two looks of the host, at which the time is taken."""

FEWEST = 3
"""Sentences that an answer must have, so that passes lie between its first look and its last."""

RECOMPUTED = 4
"""Ids that the peer says where each of them costs a pass over everything."""

HEAD: list[Any] = [
    *("precision", "rows", "codes read", "prompts s", "ms a pass", "spread", "passes"),
    *("tokens/s", "masks/s", "answers s", "MB a pass", "of the copy", "compiled", "GiB at most"),
]
PEER_HEAD: list[Any] = [
    *("precision", "rows", "LLaVA", "prompts s", "ms a token", "spread", "tokens/s"),
    *("ours is faster by", "with codes at once"),
]

EXAMPLES = """examples:
  pixellm bench generate --size ref47m --batch 1 4 16 64
  pixellm bench generate --size ref47m --batch 1 16 --precision float32 bfloat16 --peer

Prompts of 40 ids, the image and 30 ids, each about a picture of its own; an answer says one
sentence (10 ids and the codebook tokens of a target, which a pass reads one by one, or at once)
again and again: an engine chooses, by the number of rows. Prompts: pictures and
questions are read. A pass: of all rows through the language model; it reads the model's weights
and the keys and values of what was read and said. Of the copy: the part of the bandwidth of a copy
that this is. Tokens/s: while decoding, without prompts and masks. Answers: all of it.
"""


class Run(NamedTuple):
    """Seconds of all prompts, of a pass, of all masks and of everything; decoding passes.

    compiled: programs that had to be compiled.
    """

    prompts: float
    step: float
    masks: float
    whole: float
    passes: int
    compiled: int


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    """Declares the options."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "generate",
        help="answers, with their masks",
        description="Times answers of a known length to questions about random pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=BENCH_SIZES, default="ref47m")
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="layers of a trained model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="(the dtype of the model)"
    )
    parser.add_argument("--masks", type=int, default=6, metavar="N", help="of an answer (6)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs (3)")
    parser.add_argument(
        "--peer", action="store_true", help="compare with LLaVA of transformers in the same run"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Times one row after the other and prints the tables.

    Raises:
        InputError: a number that is too small or too large for the model, or --peer without a
            PyTorch for this device.
    """
    if min(options.batch) < 1 or options.repeat < 1 or options.masks < FEWEST:
        raise InputError(f"--batch and --repeat must be at least 1, --masks at least {FEWEST}")
    table, beside = [HEAD], [PEER_HEAD]
    for precision, config in _configs(options):
        peer = baseline.make_peer(config) if options.peer and precision in DTYPES else None
        model, vocabulary = _model(options, config, precision)
        if len(table) == 1:
            print(_heading(model), flush=True)
        for rows in options.batch:
            own, peers = _measure(model, vocabulary, peer, rows, options)
            table += [[precision, rows, *cells] for cells in own]
            beside += [[precision, rows, *cells] for cells in peers]
            print(f"{precision}, {rows} rows: {own[0][2]} ms a pass", flush=True)
    print("", format_table(table, names=1), sep="\n")
    if len(beside) > 1:
        print("", format_table(beside, names=1), sep="\n")


def _configs(options: argparse.Namespace) -> Iterator[tuple[str, ModelConfig]]:
    """Every precision and the configuration that computes in it."""
    folder = options.checkpoint
    config = BENCH_SIZES[options.size] if folder is None else checkpoint.read_config(folder)
    for precision in options.precision or [config.dtype]:
        dtype = precision if precision in DTYPES else config.dtype
        yield precision, dataclasses.replace(config, dtype=dtype)


def _model(
    options: argparse.Namespace, config: ModelConfig, precision: str
) -> tuple[PixelLM, Vocabulary]:
    """A model that recites, ready to be served, and its vocabulary."""
    if options.checkpoint is None:
        vocabulary = Vocabulary.with_codebook(FOLDER, **dataclasses.asdict(config.codebook))
        model = random_model(config)
    else:
        vocabulary = checkpoint.read_vocabulary(options.checkpoint, config)
        model = checkpoint.load_model(options.checkpoint, dtype=config.dtype)
    weights = precision if precision in WEIGHTS else None
    return serve(recite(model, sentence(vocabulary)), weights=weights), vocabulary


def _measure(
    model: PixelLM, vocabulary: Vocabulary, peer: Any, rows: int, options: argparse.Namespace
) -> tuple[list[list[str]], list[list[str]]]:
    """Runs all ways in turns, each once before; the cells of ours and of the peer's."""
    ids = sentence(vocabulary)
    tokens, masks = options.masks * len(ids), rows * options.masks
    questions = recital(model.config, ids, count=rows, sentences=options.masks)
    length, most = questions[0].length, model.config.language.max_positions
    if length + tokens > most:
        raise InputError(
            f"--masks {options.masks}: an answer of {tokens} ids after {length} is longer than the "
            f"{most} positions of the model; ask for fewer"
        )
    settings = EngineConfig(rows=rows, steps=LOOK, max_new_tokens=tokens)
    own, peers = dict[str, Callable[[], Run]](), dict[str, Callable[[], PeerRun]]()
    for name, at_once in (("one by one", 0), ("at once", sys.maxsize)):
        config = dataclasses.replace(settings, at_once=at_once)
        own[name] = partial(_answer_anew, model, vocabulary, config, questions)
    if peer is not None:
        say = partial(baseline.answer, peer, rows=rows, length=length)
        peers["cached"] = partial(say, tokens=tokens, cache=True)
        if rows == min(options.batch):
            peers["recomputed"] = partial(say, tokens=RECOMPUTED, cache=False)
    compiled = {name: way().compiled for name, way in own.items()}
    for way in peers.values():
        way()
    rounds = [
        ({name: way() for name, way in own.items()}, {name: way() for name, way in peers.items()})
        for _ in range(options.repeat)
    ]
    moved = pass_bytes(model, rows, length + tokens // 2)
    ours, theirs, speeds = list[list[str]](), list[list[str]](), list[float]()
    for name in own:
        runs = [found[name] for found, _ in rounds]
        step, passes = median(run.step for run in runs), runs[0].passes
        speeds.append(rows * (tokens - 1) / (passes * step))
        cells = [f"{median(run.prompts for run in runs):.3f}", *_step_cells(runs), f"{passes}"]
        cells += [f"{speeds[-1]:.1f}", f"{masks / median(run.masks for run in runs):.1f}"]
        cells += [f"{median(run.whole for run in runs):.3f}", f"{moved / 1e6:.1f}"]
        cells += [f"{moved / step / flops.copy_bandwidth():.0%}", f"{compiled[name]}"]
        ours.append([name, *cells, f"{memory_bytes() / 2**30:.2f}"])
    for name in peers:
        others = [found[name] for _, found in rounds]
        speed = rows / median(run.step for run in others)
        cells = [f"{median(run.prompts for run in others):.3f}", *_step_cells(others)]
        theirs.append([name, *cells, f"{speed:.1f}", *(f"{s / speed:.2f}" for s in speeds)])
    return ours, theirs


def _step_cells(runs: Sequence[Run] | Sequence[PeerRun]) -> list[str]:
    """Median and range of a pass in milliseconds."""
    steps = [1e3 * run.step for run in runs]
    return [f"{median(steps):.2f}", f"{min(steps):.2f}-{max(steps):.2f}"]


def _answer_anew(
    model: PixelLM, vocabulary: Vocabulary, config: EngineConfig, questions: Sequence[Question]
) -> Run:
    """By an engine that has not seen the pictures; programs that are compiled stay so."""
    return answer(Engine(model, vocabulary, config), questions)


def answer(engine: Engine, questions: Sequence[Question]) -> Run:
    """Answers all questions at once and takes the time at every look of the host.

    Between the first look, which reads the prompts, and the last, which decodes the masks, there
    are only passes; the passes of these two are taken off at the same price.
    """
    for question in questions:
        engine.add(question)
    seconds, passes = list[float](), list[int]()
    while not engine.idle:
        before, begin = engine.passes, time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        passes.append(engine.passes - before)
    passes[0] -= 1  # that of the questions
    step = sum(seconds[1:-1]) / sum(passes[1:-1])
    return Run(
        prompts=seconds[0] - passes[0] * step,
        step=step,
        masks=seconds[-1] - passes[-1] * step,
        whole=sum(seconds),
        passes=sum(passes),
        compiled=engine.programs.compiled.total(),
    )


def pass_bytes(model: PixelLM, rows: int, positions: int) -> float:
    """Least bytes of a pass over one new id per row, `positions` of which are in the cache.

    The language model's weights, as they are stored, but of the embeddings only rows; keys and
    values. What a pass writes, and what does not stay in the caches of a CPU, is not counted.
    """
    config, values = model.config.language, 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model.language_model)):
        if path != ("embedding",):
            values += variable.size * _bits(variable.dtype) / 8
    kept = 2 * config.layers * config.kv_heads * config.head
    return values + rows * (config.width + positions * kept) * _bits(model.config.dtype) / 8


def _bits(dtype: Any) -> int:
    return jax.dtypes.itemsize_bits(dtype)


def _heading(model: PixelLM) -> str:
    """The model and the machine."""
    count = sum(variable.size for _, variable in nnx.to_flat_state(nnx.state(model)))
    config, device = model.config, jax.devices()[0]
    peaks = ", ".join(f"{flops.matmul_peak(dtype) / 1e12:.3f} in {dtype}" for dtype in DTYPES)
    return (
        f"{count / 1e6:.1f} M parameters, canvas {config.vision.canvas}\n"
        f"{device.device_kind}, jax {jax.__version__}: {peaks} TFLOP/s in a matrix product, "
        f"{flops.copy_bandwidth() / 1e9:.1f} GB/s copied"
    )
