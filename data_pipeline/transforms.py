"""Example -> conversations: what is asked about an image, what is answered, and which masks.

Pure functions. Every choice comes from `Sampler`, in the order in which the released training
code makes it, so that its recorded choices give its texts; `tests/goldens/test_draws.py` does so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from data_pipeline.errors import DamagedError
from data_pipeline.example import KINDS, SEG, Example, Target, Turn
from data_pipeline.sampling import Sampler
from data_pipeline.templates import (
    LONG_EVALUATION,
    LONG_QUESTIONS,
    SHORT_EVALUATION,
    Choices,
    ask,
    choices,
    enumerate_words,
    fill,
    fill_each,
)
from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.errors import InputError

T = TypeVar("T")

IMAGE_LINE = f"{IMAGE}\n"
"""Precedes the first question of every conversation."""

CATEGORY = 0.1
"""Probability of naming a target of MUSE by its category although it has a rephrased name."""


@dataclass(frozen=True, kw_only=True)
class ComposeSettings:
    """Sampling of conversations. The defaults reproduce the published training.

    num_classes_per_sample: questions about one image, at most (not MUSE: all of its questions).
    num_classes_per_question: targets of one question, at most (kind "names").
    explanatory: how often an image that has an explanation is asked for the explanation alone;
        else for the mask, with and without it equally often. None: explanations are not used.
    expanded: draw from the further questions too.

    Raises:
        InputError: a number of classes is below 1, or `explanatory` is no probability.
    """

    num_classes_per_sample: int = 3
    num_classes_per_question: int = 3
    explanatory: float | None = 0.1
    expanded: bool = True

    def __post_init__(self) -> None:
        for name in ("num_classes_per_sample", "num_classes_per_question"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.explanatory is not None and not 0 <= self.explanatory <= 1:
            raise InputError(f"explanatory={self.explanatory} must be None or between 0 and 1")


class Composed(NamedTuple):
    """One conversation about an image.

    messages: questions and answers in turn, `<image>` and a newline in front of the first; an
        answer "" is open (generation).
    masks: index into `Example.masks` for each group of codebook tokens, in the order of the groups
        (of an open answer: what it should find). A mask may stand for several groups.
    phrases: what was asked for, for each group.
    """

    messages: tuple[str, ...]
    masks: tuple[int, ...]
    phrases: tuple[str, ...]


class _Round(NamedTuple):
    """A question and its answer as text, with (phrase, mask) of each target."""

    question: str
    answer: str
    targets: Sequence[tuple[str, int]] = ()


def compose(
    example: Example, sampler: Sampler, settings: ComposeSettings, *, group_text: str
) -> tuple[Composed, ...]:
    r"""Sample the training conversations of an example; `group_text` is `Vocabulary.group_text`.

        names   targets dog, cat, Left dog (masks 0, 1, 0), two questions at most
        ->  "<image>\nWhat is cat and dog in this image? Please output segmentation mask."
            "cat is [SEG0] [SEG1] and dog is [SEG0] [SEG1]."                          masks 1 0
            "<image>\nPlease segment the left dog in this image."
            "Sure, it is [SEG0] [SEG1]."                                              masks 0

        muse    question "Who barks?", answer "The dog {seg} does.", target dog (mask 0)
        ->  "<image>\nWho barks? Please respond with segmentation mask."
            "The dog [SEG0] [SEG1] does."                                             masks 0

    short, long: if there is an explanation, one of three modes is drawn for the image: to ask for
    the mask, for mask and explanation, or for the explanation alone, which has no mask. instruct,
    ready: nothing is drawn. An example without targets and conversations gives no conversation.

    Raises:
        DamagedError: an answer has another number of groups than targets (one `{seg}` too many, or
            text that looks like codebook tokens), or a question of MUSE has neither answer nor
            targets.
        ValueError: an unknown kind.
    """
    match example.kind:
        case "names":
            conversations = _names(example, sampler, settings, group_text)
        case "short" | "long":
            conversations = _reasoning(example, sampler, settings, group_text)
        case "muse":
            conversations = _muse(example, sampler, settings, group_text)
        case _:
            conversations = _as_they_are(example, group_text)
    return tuple(_join(IMAGE_LINE, rounds, group_text) for rounds in conversations)


def compose_evaluation(
    example: Example, *, group_text: str, group: tuple[int, ...] | None = None
) -> tuple[Composed, ...]:
    r"""Compose the conversations that a model is evaluated on: nothing is random.

    names: all targets in order by their preferred phrase, in lower case, with answers (teacher
        forcing). `group` asks for several at once: (6, 5, 4) for 6, 5, 4, 6, 5, 4, ... of them.
    short, long: the first text with its answer.
    muse: every question in the first long template, with an open answer. (The released code draws
        one of two templates, so its numbers vary from run to run.)
    instruct, ready: as they are.

        names   targets Left dog, cat (masks 0, 1)
        ->  "<image>\n What is left dog in this image? Please output segmentation mask."
            "[SEG0] [SEG1]."                                                          masks 0
            "<image>\n What is cat in this image? Please output segmentation mask."
            "[SEG0] [SEG1]."                                                          masks 1

    The blank after the newline, and the full stop that is missing where `group` leaves one target
    alone, belong to the released protocol.

    Raises:
        DamagedError: as `compose`.
        ValueError: an unknown kind, or a size in `group` that is below 1.
    """
    if group is not None and (not group or min(group) < 1):
        raise ValueError(f"group is {group}, expected sizes of at least 1")
    match example.kind:
        case "names":
            before = f"{IMAGE_LINE} "
            conversations = _forced_names(example.targets, group, group_text)
        case "short" | "long":
            before, conversations = f"{IMAGE_LINE} ", _forced_text(example, group_text)
        case "muse":
            before, conversations = IMAGE_LINE, _open_questions(example)
        case _:
            before, conversations = IMAGE_LINE, _as_they_are(example, group_text)
    return tuple(_join(before, rounds, group_text) for rounds in conversations)


def _names(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    lists = choices("names", expanded=settings.expanded)
    most = settings.num_classes_per_sample * settings.num_classes_per_question
    targets = _at_most(most, example.targets, sampler)
    named = [(_name(target, sampler), target.mask) for target in targets]
    for asked in _distribute(named, sampler, settings):
        names = [name for name, _ in asked]
        together = enumerate_words(names).lower()
        question = fill(_pick(lists.questions, sampler), name=together)
        separate = sampler.coin()  # drawn for a single target too
        if len(names) == 1:
            answer = fill(_pick(lists.answers, sampler), seg=seg)
        elif separate:
            answer = fill_each(_pick(lists.separate, sampler), names, seg=seg)
        else:
            template = _pick(lists.joint, sampler)
            answer = fill(template, name=together, seg=_groups(seg, len(names)))
        yield [_Round(question, answer, asked)]


def _name(target: Target, sampler: Sampler) -> str:
    count = len(target.phrases)
    return target.phrases[int(sampler.uniform() * count) if count > 1 else 0]


def _distribute(things: Sequence[T], sampler: Sampler, settings: ComposeSettings) -> list[list[T]]:
    """Shuffles things and spreads them over questions: first one each, then where there is room.

    5 things, 3 questions with room for 3  ->  1, 2, 2 or 1, 1, 3 of them, in any order
    """
    questions: list[list[T]] = [[] for _ in things[: settings.num_classes_per_sample]]
    for i in sampler.permutation(len(things)):
        empty = [question for question in questions if not question]
        room = [q for q in questions if len(q) < settings.num_classes_per_question]
        _pick(empty or room, sampler).append(things[i])
    return questions


def _reasoning(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    lists = choices(example.kind, expanded=settings.expanded)
    conversations = _at_most(settings.num_classes_per_sample, example.conversations, sampler)
    mode = _explanation_mode(example, sampler, settings)
    for turns in conversations:
        yield [_reasoning_round(example, turn, lists, mode, sampler, seg) for turn in turns]


def _explanation_mode(example: Example, sampler: Sampler, settings: ComposeSettings) -> int:
    """0: ask for the mask; 1: for the mask and the explanation; 2: for the explanation."""
    explained = any(turn.answer is not None for turns in example.conversations for turn in turns)
    if settings.explanatory is None or not explained:
        return 0
    return 2 if sampler.uniform() < settings.explanatory else int(sampler.coin())


def _reasoning_round(
    example: Example, turn: Turn, lists: Choices, mode: int, sampler: Sampler, seg: str
) -> _Round:
    question = _pick(lists.questions, sampler)  # drawn where it is not used, too
    if mode == 2 and turn.answer is not None:
        return _Round(turn.question, turn.answer)
    answer = fill(_pick(lists.answers, sampler), seg=_groups(seg, len(turn.targets)))
    if mode == 1 and turn.answer is not None:
        question = _pick(lists.explanatory, sampler)
        answer = f"{answer} {turn.answer}"
    return _Round(ask(question, turn.question), answer, _targets(example, turn))


def _muse(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    lists = choices("muse", expanded=settings.expanded)
    for turns in example.conversations:
        yield [_muse_round(example, turn, lists, sampler, seg) for turn in turns]


def _muse_round(example: Example, turn: Turn, lists: Choices, sampler: Sampler, seg: str) -> _Round:
    question = ask(_pick(lists.questions, sampler), turn.question)
    if turn.answer is not None:
        return _Round(question, turn.answer.replace(SEG, seg), _targets(example, turn))
    targets = [example.targets[i] for i in turn.targets]
    groups = _groups(seg, len(targets))
    names = [t.phrases[0 if sampler.uniform() > CATEGORY else -1] for t in targets]
    if sampler.coin():
        answer = fill_each(_pick(lists.separate, sampler), names, seg=seg)
    else:
        answer = fill(_pick(lists.joint, sampler), name=", ".join(names).lower(), seg=groups)
    asked = [(name, target.mask) for name, target in zip(names, targets, strict=True)]
    return _Round(question, answer, asked)


def _as_they_are(example: Example, seg: str) -> Iterator[Sequence[_Round]]:
    if example.kind not in ("instruct", "ready"):
        raise ValueError(f"{example.kind!r} is not one of the kinds {', '.join(KINDS)}")
    for turns in example.conversations:
        answers = [turn.answer or "" for turn in turns]
        if example.kind == "ready":
            answers = [answer.replace(SEG, seg) for answer in answers]
        yield [
            _Round(turn.question, answer, _targets(example, turn))
            for turn, answer in zip(turns, answers, strict=True)
        ]


def _open_questions(example: Example) -> Iterator[Sequence[_Round]]:
    for turn in itertools.chain(*example.conversations):
        yield [_Round(ask(LONG_QUESTIONS[0], turn.question), "", _targets(example, turn))]


def _forced_text(example: Example, seg: str) -> Iterator[Sequence[_Round]]:
    template = SHORT_EVALUATION if example.kind == "short" else LONG_EVALUATION
    for turn in itertools.chain(*example.conversations[:1]):
        question = fill(template, name=turn.question, text=turn.question)
        answer = f"{_groups(seg, len(turn.targets))}."
        yield [_Round(question, answer, _targets(example, turn))]


def _forced_names(
    targets: Sequence[Target], group: Sequence[int] | None, seg: str
) -> Iterator[Sequence[_Round]]:
    """Asks for all targets, one by one or in groups of the sizes, which are repeated."""
    rest = list(targets)
    for size in itertools.cycle(group or (1,)):
        asked, rest = rest[:size], rest[size:]
        if not asked:
            return
        names = [target.phrases[0].strip().lower() for target in asked]
        question = fill(SHORT_EVALUATION, name=enumerate_words(names))
        answer = _groups(seg, len(asked)) + "." * (group is None or len(asked) > 1)
        masks = [target.mask for target in asked]
        yield [_Round(question, answer, list(zip(names, masks, strict=True)))]


def _groups(seg: str, count: int) -> str:
    if not count:
        raise DamagedError("a question has no targets and no answer; expected one of them")
    return enumerate_words([seg] * count)


def _targets(example: Example, turn: Turn) -> list[tuple[str, int]]:
    """Phrase and mask of each target; with "short" and "long" the question is the phrase."""
    targets = [example.targets[i] for i in turn.targets]
    if example.kind in ("short", "long"):
        return [(turn.question, target.mask) for target in targets]
    return [(target.phrases[0] if target.phrases else "", target.mask) for target in targets]


def _at_most(most: int, things: Sequence[T], sampler: Sampler) -> Sequence[T]:
    """Sample `most` things; fewer things stay as they are, in order."""
    enough = len(things) >= most
    return [things[i] for i in sampler.subset(len(things), most)] if enough else things


def _pick(options: Sequence[T], sampler: Sampler) -> T:
    return options[sampler.index(len(options))]


def _join(before: str, rounds: Sequence[_Round], seg: str) -> Composed:
    first, *others = (message for each in rounds for message in (each.question, each.answer))
    targets = [target for each in rounds for target in each.targets]
    messages = (before + first, *others)
    found, expected = sum(answer.count(seg) for answer in messages[1::2]), len(targets)
    if found != expected and any(messages[1::2]):
        raise DamagedError(f"the answers of {first!r} hold {found} groups for {expected} targets")
    return Composed(
        messages, tuple(mask for _, mask in targets), tuple(phrase for phrase, _ in targets)
    )
