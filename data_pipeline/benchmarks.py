"""Benchmarks by name, and their questions, image by image, in the published words.

`transforms.compose_evaluation` composes the questions; nothing is random.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipeline.errors import DamagedError
from data_pipeline.example import SEG, Example
from data_pipeline.formats.masks import decode_many, encode
from data_pipeline.reading import Reading, Source
from data_pipeline.sources.instruct import LlavaInstruct
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.sources.muse import Muse
from data_pipeline.sources.reason import ReasonSeg
from data_pipeline.sources.refer import GREFCOCO, REFCOCO, REFCOCO_PLUS, REFCOCOG
from data_pipeline.sources.shapes.dataset import Shapes
from data_pipeline.templates import enumerate_words
from data_pipeline.transforms import Composed, compose_evaluation
from pixellm_jax.benchmark_question import GENERATED, GIVEN, BenchmarkQuestion, Rle
from pixellm_jax.errors import InputError
from pixellm_jax.text.answer import MARKER

MAX_FEW = 3
"""Maximum number of targets of a question of MUSE in the breakdown "few"; more are "many"."""

GROUP = (6, 5, 4)
"""Numbers of sentences per question of the "multi" benchmarks, repeated in turn."""


class ImageSource(Source, Protocol):
    """A source that knows the paths of its images."""

    def image_path(self, entry: Any) -> Path | None:
        """Return the path of the image of an entry; None if the image is generated."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: a dataset with the way in which its questions are asked."""

    name: str
    source: ImageSource
    split: str = "val"
    """Default split."""
    group: tuple[int, ...] | None = None
    """Number of sentences per question, repeated in turn; None: one sentence each."""
    united: bool = False
    """Every question asks for one region (see `BenchmarkQuestion`)."""
    released: str = ""
    """Mode in which the released code reports scores, "" if it has none."""
    text_only: bool = False
    """Answers are text without masks."""


class GeneratedScene(NamedTuple):
    """Entry of a scene of shapes."""

    key: str
    split: str
    number: int


@dataclass(frozen=True, kw_only=True)
class GeneratedShapes:
    """Source of generated scenes of shapes; `root` is not used."""

    dataset: str = "shapes"
    splits: tuple[str, ...] = ("train", "val", "test")

    def entries(self, root: Path, split: str) -> Sequence[GeneratedScene]:
        return [GeneratedScene(f"{split}/{i}", split, i) for i in range(len(Shapes(split=split)))]

    def read(self, entry: GeneratedScene) -> Reading:
        return Reading(Shapes(split=entry.split)[entry.number])

    def image_path(self, entry: GeneratedScene) -> None:
        """Return None: there is no file."""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(
            Benchmark(name=source.dataset, source=source, united=True, released=GIVEN)
            for source in (REFCOCO, REFCOCO_PLUS, REFCOCOG)
        ),
        *(
            Benchmark(name=f"multi{source.dataset}", source=source, group=GROUP, released=GIVEN)
            for source in (REFCOCO, REFCOCO_PLUS, REFCOCOG)
        ),
        Benchmark(name="reasonseg", source=ReasonSeg(), united=True, released=GIVEN),
        Benchmark(name="grefcoco", source=GREFCOCO, united=True),
        Benchmark(name="muse", source=Muse(), released=GENERATED),
        Benchmark(name="shapes", source=GeneratedShapes(), split="test"),
        Benchmark(name="llava", source=LlavaInstruct(), split="train", text_only=True),
        Benchmark(name="jsonl", source=Jsonl()),
    )
}


def find_benchmark(name: str, split: str | None = None) -> tuple[Benchmark, str]:
    """Return the benchmark "name" or "name/split", and its split; `split` selects it separately.

    Raises:
        InputError: no such benchmark or split, or two different splits are named.
    """
    short, slash, split_in_name = name.partition("/")
    if short not in BENCHMARKS:
        raise InputError(f"no benchmark {short!r}: choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[short]
    if slash and split not in (None, split_in_name):
        raise InputError(f"--benchmark {name} and --split {split}: name one split")
    chosen = split_in_name if slash else split or benchmark.split
    if chosen not in benchmark.source.splits:
        splits = ", ".join(benchmark.source.splits)
        raise InputError(f"{short} has no split {chosen!r}: choose from {splits}")
    return benchmark, chosen


def list_images(benchmark: Benchmark, root: Path, split: str) -> Sequence[Any]:
    """Return the entries of a split, one per image; `read_questions` reads their questions.

    Raises:
        InputError: files are missing or damaged as a whole, or the split is empty.
    """
    entries = benchmark.source.entries(root, split)
    if not entries:
        others = [s for s in benchmark.source.splits if benchmark.source.entries(root, s)]
        hint = f"there are some in {', '.join(others)}" if others else "nor in any other split"
        raise InputError(f"{root}: no image of {benchmark.name} in the split {split!r}; {hint}")
    return entries


class Questions(NamedTuple):
    """The questions about an image, and a line for each part that was left out."""

    questions: tuple[BenchmarkQuestion, ...]
    problems: tuple[str, ...] = ()


def read_questions(benchmark: Benchmark, root: Path, split: str, entry: Any) -> Questions:
    """Read all questions about an image.

    Raises:
        DamagedError: the image or its annotations cannot be used.
    """
    example, problems = benchmark.source.read(entry)
    path = benchmark.source.image_path(entry)
    composed = compose_evaluation(example, group_text=MARKER, group=benchmark.group)
    key = example.key if example.key.startswith(f"{split}/") else f"{split}/{example.key}"
    relative_path = "" if path is None else path.relative_to(root).as_posix()
    groups = _groups(benchmark, example, composed)
    questions = list[BenchmarkQuestion]()
    for question_groups, turn in zip(groups, _split_turns(example, composed), strict=True):
        questions.append(
            BenchmarkQuestion(
                id=f"{benchmark.name}/{key}/{len(questions)}",
                picture=relative_path,
                image=example.image,
                hw=example.hw,
                messages=turn.messages,
                given=turn.given,
                expected=turn.expected,
                truth=tuple(_remove_void(example.masks[m], example.void) for m in turn.masks),
                void=example.void,
                groups=question_groups,
                descriptions=turn.phrases,
                united=benchmark.united,
            )
        )
    return Questions(tuple(questions), problems)


def question_reader(benchmark: Benchmark, root: Path, split: str) -> Callable[[Any], Questions]:
    """Return a function that reads the questions of an entry, none if the entry is damaged."""

    def read(entry: Any) -> Questions:
        try:
            return read_questions(benchmark, root, split, entry)
        except DamagedError as reason:
            return Questions((), (str(reason),))

    return read


class _QuestionTurn(NamedTuple):
    """One question of a conversation; `messages` ends with it."""

    messages: tuple[str, ...]
    given: str
    expected: str
    masks: tuple[int, ...]
    phrases: tuple[str, ...]


def _split_turns(example: Example, composed: Sequence[Composed]) -> list[_QuestionTurn]:
    """Return every turn of every conversation, with the true answers of the turns before it."""
    turns = list[_QuestionTurn]()
    for number, conversation in enumerate(composed):
        first = 0
        answers = conversation.messages[1::2]
        for turn, answer in enumerate(answers):
            count = answer.count(MARKER) if answer else len(conversation.masks)
            masks = conversation.masks[first : first + count]
            phrases = conversation.phrases[first : first + count]
            first += count
            given = expected = answer
            if example.kind == "muse":
                true_answer = example.conversations[number][turn].answer or ""
                expected = true_answer.replace(SEG, MARKER)
                given = f"{enumerate_words([MARKER] * count)}." if count else ""
            messages = conversation.messages[: 2 * turn + 1]
            names = phrases if example.kind not in ("short", "long") else ()
            turns.append(_QuestionTurn(messages, given, expected, masks, names))
    return turns


def _groups(
    benchmark: Benchmark, example: Example, composed: Sequence[Composed]
) -> list[tuple[str, ...]]:
    """Return the names of the breakdowns to which each question belongs."""
    counts = [len(c.masks) for c in composed]
    match benchmark.name:
        case "muse":
            return [(("none", "few", "many")[(n > 0) + (n > MAX_FEW)],) for n in counts]
        case "reasonseg":
            return [(example.kind,) for _ in counts]
        case "grefcoco":
            named = [[i for i in target.ids[1:-1] if i >= 0] for target in example.targets]
            sizes = ("no target", "one target", "several targets")
            return [(sizes[min(len(ids), 2)],) for ids in named]
        case "shapes":
            kinds = Shapes(split=example.split).kinds(int(example.key))
            return [(f"kind: {kind}",) for kind in kinds]
    if benchmark.group is not None:
        return [(f"sentences: {n}",) for n in counts]
    return list(itertools.chain.from_iterable([()] * (len(c.messages) // 2) for c in composed))


def _remove_void(mask: Rle, void: Rle | None) -> Rle:
    """Return the mask without void pixels."""
    if void is None:
        return mask
    inside, void_pixels = decode_many([mask, void])
    return encode(inside & (1 - void_pixels)) if (inside & void_pixels).any() else mask
