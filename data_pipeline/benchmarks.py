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

FEW = 3
"""A question of MUSE has "few" targets up to here, and "many" above."""

GROUP = (6, 5, 4)
"""Sentences that the "multi" benchmarks ask for at once, in turn."""


class HasImages(Source, Protocol):
    """A source that knows where its images lie (None: they are drawn)."""

    def image_path(self, entry: Any) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark. `split`: the one that is meant where none is named.

    group: sentences that are asked for at once. united: every question asks for one region (see
    `BenchmarkQuestion`). released: the mode in which the released code has numbers; "" if none.
    words: the answers are words alone, without masks.
    """

    name: str
    source: HasImages
    split: str = "val"
    group: tuple[int, ...] | None = None
    united: bool = False
    released: str = ""
    words: bool = False


class GeneratedScene(NamedTuple):
    """A scene of shapes as an entry."""

    key: str
    split: str
    number: int


@dataclass(frozen=True, kw_only=True)
class GeneratedShapes:
    """Shapes as a source; `root` is not looked at."""

    dataset: str = "shapes"
    splits: tuple[str, ...] = ("train", "val", "test")

    def entries(self, root: Path, split: str) -> Sequence[GeneratedScene]:
        return [GeneratedScene(f"{split}/{i}", split, i) for i in range(len(Shapes(split=split)))]

    def read(self, entry: GeneratedScene) -> Reading:
        return Reading(Shapes(split=entry.split)[entry.number])

    def image_path(self, entry: GeneratedScene) -> None:
        """There is no file."""


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
        Benchmark(name="llava", source=LlavaInstruct(), split="train", words=True),
        Benchmark(name="jsonl", source=Jsonl()),
    )
}


def find_benchmark(name: str, split: str | None = None) -> tuple[Benchmark, str]:
    """A benchmark and its split, from "name" or "name/split"; `split`: named apart.

    Raises:
        InputError: no such benchmark or split, or two different splits are named.
    """
    short, slash, own = name.partition("/")
    if short not in BENCHMARKS:
        raise InputError(f"no benchmark {short!r}: choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[short]
    if slash and split not in (None, own):
        raise InputError(f"--benchmark {name} and --split {split}: name one split")
    chosen = own if slash else split or benchmark.split
    if chosen not in benchmark.source.splits:
        splits = ", ".join(benchmark.source.splits)
        raise InputError(f"{short} has no split {chosen!r}: choose from {splits}")
    return benchmark, chosen


def list_images(benchmark: Benchmark, root: Path, split: str) -> Sequence[Any]:
    """The entries of a split, of which `read_questions` makes the questions.

    Raises:
        InputError: files are missing or damaged as a whole, or the split is empty.
    """
    entries = benchmark.source.entries(root, split)
    if not entries:
        others = [s for s in benchmark.source.splits if benchmark.source.entries(root, s)]
        found = f"there is some in {', '.join(others)}" if others else "nor in any other split"
        raise InputError(f"{root}: no picture of {benchmark.name} in the split {split!r}; {found}")
    return entries


class Questions(NamedTuple):
    """The questions about an image, and a line for each part that was left out."""

    questions: tuple[BenchmarkQuestion, ...]
    problems: tuple[str, ...] = ()


def read_questions(benchmark: Benchmark, root: Path, split: str, entry: Any) -> Questions:
    """Everything that is asked about an image.

    Raises:
        DamagedError: the image or its annotations cannot be used.
    """
    example, problems = benchmark.source.read(entry)
    path = benchmark.source.image_path(entry)
    composed = compose_evaluation(example, group_text=MARKER, group=benchmark.group)
    key = example.key if example.key.startswith(f"{split}/") else f"{split}/{example.key}"
    picture = "" if path is None else path.relative_to(root).as_posix()
    groups = _groups(benchmark, example, composed)
    questions = list[BenchmarkQuestion]()
    for own, one in zip(groups, _single(example, composed), strict=True):
        questions.append(
            BenchmarkQuestion(
                id=f"{benchmark.name}/{key}/{len(questions)}",
                picture=picture,
                image=example.image,
                hw=example.hw,
                messages=one.messages,
                given=one.given,
                expected=one.expected,
                truth=tuple(_known(example.masks[m], example.void) for m in one.masks),
                void=example.void,
                groups=own,
                descriptions=one.phrases,
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


class _One(NamedTuple):
    """A single question: `messages` ends with it."""

    messages: tuple[str, ...]
    given: str
    expected: str
    masks: tuple[int, ...]
    phrases: tuple[str, ...]


def _single(example: Example, composed: Sequence[Composed]) -> list[_One]:
    """Each turn of each conversation is a question, with the turns before it as they should be."""
    found = list[_One]()
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
                own = example.conversations[number][turn].answer or ""
                expected = own.replace(SEG, MARKER)
                given = f"{enumerate_words([MARKER] * count)}." if count else ""
            words = phrases if example.kind not in ("short", "long") else ()
            found.append(_One(conversation.messages[: 2 * turn + 1], given, expected, masks, words))
    return found


def _groups(
    benchmark: Benchmark, example: Example, composed: Sequence[Composed]
) -> list[tuple[str, ...]]:
    """Names of the breakdowns that each question belongs to."""
    counts = [len(c.masks) for c in composed]
    match benchmark.name:
        case "muse":
            return [(("none", "few", "many")[(n > 0) + (n > FEW)],) for n in counts]
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


def _known(mask: Rle, void: Rle | None) -> Rle:
    """The mask without void pixels."""
    if void is None:
        return mask
    inside, unknown = decode_many([mask, void])
    return encode(inside & (1 - unknown)) if (inside & unknown).any() else mask
