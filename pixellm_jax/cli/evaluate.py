"""`pixellm evaluate`: asks a model the questions of a benchmark and scores text and masks."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.example import SEG
from data_pipeline.masks import decode_many
from data_pipeline.sources.shapes import Shapes
from pixellm_jax import checkpoint
from pixellm_jax.cli.table import format_table
from pixellm_jax.engine import Engine, EngineConfig
from pixellm_jax.errors import InputError
from pixellm_jax.evaluate_generated import Asked, Scored, Summary, score_answers, summarise
from pixellm_jax.image import read_image
from pixellm_jax.serving import serve

BENCHMARKS = ("shapes",)
REPORT = "report.json"
EXAMPLES = """example:
  pixellm evaluate --checkpoint runs/shapes/model --benchmark shapes --out report
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="score a model on a benchmark",
        description="Asks a model the questions of a benchmark; it writes its answers itself. "
        "Scores are printed and written to OUT/report.json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument("--split", default="test", help="of the benchmark (test)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--rows", type=int, default=32, help="questions answered together (32)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write report.json")
    return parser


def run(options: argparse.Namespace) -> None:
    """Evaluates, prints a table by kind of question, writes the report."""
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: expected at least 1")
    model = checkpoint.load_model(options.checkpoint)
    vocabulary = checkpoint.read_vocabulary(options.checkpoint, model.config)
    engine = Engine(serve(model), vocabulary, EngineConfig(rows=options.rows, max_new_tokens=96))
    shapes = Shapes(split=options.split)
    count = min(len(shapes), options.limit or len(shapes))
    begin = time.perf_counter()
    scored: list[Scored] = []
    with tqdm(desc="evaluating", unit="question", disable=None) as bar:
        for row in score_answers(engine, vocabulary, _shapes(shapes, count)):
            scored.append(row)
            bar.update()
    seconds = time.perf_counter() - begin
    kinds = sorted({row.kind for row in scored})
    parts = {kind: summarise(row for row in scored if row.kind == kind) for kind in kinds}
    whole = summarise(scored)
    rows = [[name, *_cells(part)] for name, part in [*parts.items(), ("all", whole)]]
    print(format_table([["kind", *Summary._fields], *rows], names=1))
    print(f"benchmark {options.benchmark}/{options.split}, mode generated, {seconds:.0f} s")
    if options.out is not None:
        _write(options.out, options, whole, parts)


def _cells(part: Summary) -> list[str]:
    return [f"{value:.4f}" if isinstance(value, float) else str(value) for value in part]


def _shapes(shapes: Shapes, count: int) -> Iterator[Asked]:
    for index in range(count):
        example = shapes[index]
        image = read_image(Image.open(io.BytesIO(example.image)), upright=False)
        for kind, (turn,) in zip(shapes.kinds(index), example.conversations, strict=True):
            masks = [example.masks[example.targets[t].mask] for t in turn.targets]
            truth = decode_many(masks) if masks else np.zeros((0, *example.hw), np.uint8)
            answer = (turn.answer or "").replace(SEG, "[SEG]")
            yield Asked(image, turn.question, truth, kind, answer)


def _write(
    out: Path, options: argparse.Namespace, whole: Summary, parts: dict[str, Summary]
) -> None:
    report = {
        "benchmark": options.benchmark,
        "split": options.split,
        "mode": "generated",
        "checkpoint": str(options.checkpoint),
        "scores": whole._asdict(),
        "kinds": {kind: part._asdict() for kind, part in parts.items()},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out}: cannot write here ({error.strerror or error}); choose another --out"
        ) from None
