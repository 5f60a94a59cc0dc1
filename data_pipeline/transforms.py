"""Transforms from an example to conversations: questions, answers and masks.

All functions are pure. Every random choice comes from a `Sampler`, in the order in which the
released training code makes it: replaying recorded choices reproduces its texts
(`tests/goldens/test_draws.py`).
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
    choices,
    enumerate_words,
    fill,
    fill_each,
    fill_question,
)
from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.errors import InputError

T = TypeVar("T")

IMAGE_LINE = f"{IMAGE}\n"
"""Precedes the first question of every conversation."""

CATEGORY_PROBABILITY = 0.1
"""Probability of naming a target of MUSE by its category although it has a rephrased name."""


@dataclass(frozen=True, kw_only=True)
class ComposeSettings:
    """Sampling of conversations. The defaults reproduce the published training.

    Raises:
        InputError: a number of classes is below 1, or `explanatory` is not a probability.
    """

    num_classes_per_sample: int = 3
    """Maximum number of questions about one image (except MUSE, which uses all its questions)."""
    num_classes_per_question: int = 3
    """Maximum number of targets of one question (kind "names")."""
    explanatory: float | None = 0.1
    """Probability that an image with an explanation is asked for the explanation alone. Otherwise
    it is asked for the mask, with and without the explanation equally often. None: explanations are
    not used."""
    expanded: bool = True
    """Sample from the further questions, too."""

    def __post_init__(self) -> None:
        for name in ("num_classes_per_sample", "num_classes_per_question"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.explanatory is not None and not 0 <= self.explanatory <= 1:
            raise InputError(f"explanatory={self.explanatory} must be None or between 0 and 1")


class Composed(NamedTuple):
    """One conversation about an image."""

    messages: tuple[str, ...]
    """Questions and answers in turn. `<image>` and a newline precede the first question; the answer
    "" is left to the model (generation)."""
    masks: tuple[int, ...]
    """Index into `Example.masks` of each codebook token group, in the order of the groups; for an
    answer left to the model, the true masks. Several groups may share a mask."""
    phrases: tuple[str, ...]
    """Phrase of the target of each group."""


class _Round(NamedTuple):
    """A question and its answer as text, with (phrase, mask index) of each target."""

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

    short, long: if there is an explanation, one of three modes is sampled per image: ask for the
    mask, for mask and explanation, or for the explanation alone, which has no mask. instruct,
    ready: nothing is random. An example without targets and conversations gives no conversation.

    Raises:
        DamagedError: an answer has another number of groups than targets (one `{seg}` too many, or
            text that looks like codebook tokens), or a question has neither an answer nor targets.
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
            conversations = _verbatim(example, group_text)
    return tuple(_join(IMAGE_LINE, rounds, group_text) for rounds in conversations)


def compose_evaluation(
    example: Example, *, group_text: str, group: tuple[int, ...] | None = None
) -> tuple[Composed, ...]:
    r"""Compose the conversations that a model is evaluated on: nothing is random.

    names: all targets in order by their preferred phrase, in lower case, with answers (teacher
        forcing). `group` gives the number of targets per question: (6, 5, 4) stands for
        6, 5, 4, 6, 5, 4, ...
    short, long: the first text with its answer.
    muse: every question in the first long template, with its answer left to the model. (The
        released code samples one of two templates, so its numbers vary from run to run.)
    instruct, ready: verbatim.

        names   targets Left dog, cat (masks 0, 1)
        ->  "<image>\n What is left dog in this image? Please output segmentation mask."
            "[SEG0] [SEG1]."                                                          masks 0
            "<image>\n What is cat in this image? Please output segmentation mask."
            "[SEG0] [SEG1]."                                                          masks 1

    The released protocol has the blank after the newline, and omits the full stop where `group`
    leaves a single target.

    Raises:
        DamagedError: as `compose`.
        ValueError: an unknown kind, or a size in `group` that is below 1.
    """
    if group is not None and (not group or min(group) < 1):
        raise ValueError(f"group is {group}, expected sizes of at least 1")
    match example.kind:
        case "names":
            prefix = f"{IMAGE_LINE} "
            conversations = _forced_names(example.targets, group, group_text)
        case "short" | "long":
            prefix = f"{IMAGE_LINE} "
            conversations = _forced_text(example, group_text)
        case "muse":
            prefix = IMAGE_LINE
            conversations = _open_questions(example)
        case _:
            prefix = IMAGE_LINE
            conversations = _verbatim(example, group_text)
    return tuple(_join(prefix, rounds, group_text) for rounds in conversations)


def _names(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    templates = choices("names", expanded=settings.expanded)
    limit = settings.num_classes_per_sample * settings.num_classes_per_question
    targets = _sample_up_to(limit, example.targets, sampler)
    named = [(_sample_phrase(target, sampler), target.mask) for target in targets]
    for group in _distribute(named, sampler, settings):
        names = [name for name, _ in group]
        enumeration = enumerate_words(names).lower()
        question = fill(_pick(templates.questions, sampler), name=enumeration)
        separate = sampler.coin()  # sampled for a single target, too
        if len(names) == 1:
            answer = fill(_pick(templates.answers, sampler), seg=seg)
        elif separate:
            answer = fill_each(_pick(templates.separate, sampler), names, seg=seg)
        else:
            template = _pick(templates.joint, sampler)
            answer = fill(template, name=enumeration, seg=_groups(seg, len(names)))
        yield [_Round(question, answer, group)]


def _sample_phrase(target: Target, sampler: Sampler) -> str:
    count = len(target.phrases)
    return target.phrases[int(sampler.uniform() * count) if count > 1 else 0]


def _distribute(items: Sequence[T], sampler: Sampler, settings: ComposeSettings) -> list[list[T]]:
    """Shuffle items and distribute them over questions: one each, then to any that is not full.

    5 items, 3 questions of at most 3  ->  1, 2, 2 or 1, 1, 3 items, in any order
    """
    questions: list[list[T]] = [[] for _ in items[: settings.num_classes_per_sample]]
    for i in sampler.permutation(len(items)):
        empty = [question for question in questions if not question]
        not_full = [q for q in questions if len(q) < settings.num_classes_per_question]
        _pick(empty or not_full, sampler).append(items[i])
    return questions


def _reasoning(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    templates = choices(example.kind, expanded=settings.expanded)
    conversations = _sample_up_to(settings.num_classes_per_sample, example.conversations, sampler)
    mode = _explanation_mode(example, sampler, settings)
    for turns in conversations:
        yield [_reasoning_round(example, turn, templates, mode, sampler, seg) for turn in turns]


def _explanation_mode(example: Example, sampler: Sampler, settings: ComposeSettings) -> int:
    """Sample 0: ask for the mask; 1: for the mask and the explanation; 2: for the explanation."""
    explained = any(turn.answer is not None for turns in example.conversations for turn in turns)
    if settings.explanatory is None or not explained:
        return 0
    return 2 if sampler.uniform() < settings.explanatory else int(sampler.coin())


def _reasoning_round(
    example: Example, turn: Turn, templates: Choices, mode: int, sampler: Sampler, seg: str
) -> _Round:
    question = _pick(templates.questions, sampler)  # sampled in every mode, used or not
    if mode == 2 and turn.answer is not None:
        return _Round(turn.question, turn.answer)
    answer = fill(_pick(templates.answers, sampler), seg=_groups(seg, len(turn.targets)))
    if mode == 1 and turn.answer is not None:
        question = _pick(templates.explanatory, sampler)
        answer = f"{answer} {turn.answer}"
    return _Round(fill_question(question, turn.question), answer, _targets(example, turn))


def _muse(
    example: Example, sampler: Sampler, settings: ComposeSettings, seg: str
) -> Iterator[Sequence[_Round]]:
    templates = choices("muse", expanded=settings.expanded)
    for turns in example.conversations:
        yield [_muse_round(example, turn, templates, sampler, seg) for turn in turns]


def _muse_round(
    example: Example, turn: Turn, templates: Choices, sampler: Sampler, seg: str
) -> _Round:
    question = fill_question(_pick(templates.questions, sampler), turn.question)
    if turn.answer is not None:
        return _Round(question, turn.answer.replace(SEG, seg), _targets(example, turn))
    targets = [example.targets[i] for i in turn.targets]
    groups = _groups(seg, len(targets))
    names = [t.phrases[0 if sampler.uniform() > CATEGORY_PROBABILITY else -1] for t in targets]
    if sampler.coin():
        answer = fill_each(_pick(templates.separate, sampler), names, seg=seg)
    else:
        answer = fill(_pick(templates.joint, sampler), name=", ".join(names).lower(), seg=groups)
    named = [(name, target.mask) for name, target in zip(names, targets, strict=True)]
    return _Round(question, answer, named)


def _verbatim(example: Example, seg: str) -> Iterator[Sequence[_Round]]:
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
        question = fill_question(LONG_QUESTIONS[0], turn.question)
        yield [_Round(question, "", _targets(example, turn))]


def _forced_text(example: Example, seg: str) -> Iterator[Sequence[_Round]]:
    template = SHORT_EVALUATION if example.kind == "short" else LONG_EVALUATION
    for turn in itertools.chain(*example.conversations[:1]):
        question = fill(template, name=turn.question, text=turn.question)
        answer = f"{_groups(seg, len(turn.targets))}."
        yield [_Round(question, answer, _targets(example, turn))]


def _forced_names(
    targets: Sequence[Target], group: Sequence[int] | None, seg: str
) -> Iterator[Sequence[_Round]]:
    """Ask for all targets one by one, or in groups of the given sizes, which are repeated."""
    remaining = iter(targets)
    for size in itertools.cycle(group or (1,)):
        members = list(itertools.islice(remaining, size))
        if not members:
            return
        names = [target.phrases[0].strip().lower() for target in members]
        question = fill(SHORT_EVALUATION, name=enumerate_words(names))
        answer = _groups(seg, len(members)) + "." * (group is None or len(members) > 1)
        masks = [target.mask for target in members]
        yield [_Round(question, answer, list(zip(names, masks, strict=True)))]


def _groups(seg: str, count: int) -> str:
    if not count:
        raise DamagedError("a question has no targets and no answer; expected one of them")
    return enumerate_words([seg] * count)


def _targets(example: Example, turn: Turn) -> list[tuple[str, int]]:
    """Return phrase and mask of each target; for "short" and "long" the question is the phrase."""
    targets = [example.targets[i] for i in turn.targets]
    if example.kind in ("short", "long"):
        return [(turn.question, target.mask) for target in targets]
    return [(target.phrases[0] if target.phrases else "", target.mask) for target in targets]


def _sample_up_to(limit: int, items: Sequence[T], sampler: Sampler) -> Sequence[T]:
    """Sample `limit` items; return fewer items unchanged, in order, without sampling."""
    if len(items) < limit:
        return items
    return [items[i] for i in sampler.subset(len(items), limit)]


def _pick(options: Sequence[T], sampler: Sampler) -> T:
    return options[sampler.index(len(options))]


def _join(prefix: str, rounds: Sequence[_Round], seg: str) -> Composed:
    first, *others = itertools.chain.from_iterable((r.question, r.answer) for r in rounds)
    targets = [target for turn in rounds for target in turn.targets]
    messages = (prefix + first, *others)
    answers = messages[1::2]
    num_groups = sum(answer.count(seg) for answer in answers)
    if num_groups != len(targets) and any(answers):
        raise DamagedError(
            f"the answers of {first!r} hold {num_groups} groups for {len(targets)} targets"
        )
    return Composed(
        messages,
        masks=tuple(mask for _, mask in targets),
        phrases=tuple(phrase for phrase, _ in targets),
    )
