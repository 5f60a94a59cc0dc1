from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example, Target, Turn
from data_pipeline.sampling import PhiloxSampler
from data_pipeline.templates import choices
from data_pipeline.transforms import Composed, ComposeSettings, compose, compose_evaluation
from pixellm_jax.errors import InputError

SEG = "[SEG0] [SEG1]"
NAMES = ("Ant", "bee", "cow", "Dog {seg}", "elk {", "fox }{", "{name}", r"gnu \1 %s", "hen, and")


class ScriptedSampler:
    """Sampler that returns given decisions in order, whatever the arguments are."""

    def __init__(self, *decisions: object) -> None:
        self.rest = list(decisions)

    def index(self, n: int) -> int:
        return self.rest.pop(0)

    def coin(self) -> bool:
        return self.rest.pop(0)

    def uniform(self) -> float:
        return self.rest.pop(0)

    def subset(self, n: int, size: int) -> list[int]:
        chosen = self.rest.pop(0)
        assert len(chosen) == size
        return chosen

    def permutation(self, n: int) -> list[int]:
        return self.rest.pop(0)


def example(kind: str, **fields) -> Example:
    return Example("key", "dataset", "train", kind, b"", (3, 5), **fields)


def targets(*phrases: str | tuple[str, ...], masks: Sequence[int] | None = None):
    rows = [(phrase,) if isinstance(phrase, str) else phrase for phrase in phrases]
    numbers = masks or range(len(rows))
    return tuple(Target(row, mask) for row, mask in zip(rows, numbers, strict=True))


def conversations(*turns: Turn) -> tuple[tuple[Turn, ...], ...]:
    return tuple((turn,) for turn in turns)


def run(
    script: ScriptedSampler, given: Example, expanded: bool = False, **fields
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    composed = compose(given, script, ComposeSettings(expanded=expanded, **fields), group_text=SEG)
    assert script.rest == []
    return [(c.messages, c.masks) for c in composed]


def test_names_by_hand():
    animals = example("names", targets=targets("Ant", "bee", "Cow", "dog", masks=[7, 1, 7, 3]))
    fields = {"num_classes_per_sample": 2, "num_classes_per_question": 3}
    # Cow starts question 1 and Ant question 0, to which the others are added.
    order = [[2, 0, 3, 1], 1, 0, 0, 0]
    separate = ScriptedSampler(*order, 0, True, 0, 2, False, 3)
    assert run(separate, animals, **fields) == [
        (
            (
                "<image>\nCan you segment the ant, dog and bee in this image?",
                f"Ant is {SEG}, dog is {SEG} and bee is {SEG}.",
            ),
            (7, 3, 1),
        ),
        (
            (
                "<image>\nWhat is cow in this image? Please respond with segmentation mask.",
                f"Sure, the segmentation result is {SEG}.",
            ),
            (7,),
        ),
    ]
    joint = ScriptedSampler(*order, 1, False, 0, 3, True, 4)
    assert [messages[1] for messages, _ in run(joint, animals, **fields)] == [
        f"ant, dog and bee are {SEG}, {SEG} and {SEG}, separately.",
        f"{SEG}.",
    ]


def test_more_candidates_than_fit():
    parts = targets("a", ("dog leg", "the leg of the dog"), "c", ("d x", "the x of the d"))
    script = ScriptedSampler([3, 1, 0], 0.49, 0.5, [0, 1, 2], 0, 0, 0, 17, True, 2)
    actual = run(
        script,
        example("names", targets=parts),
        expanded=True,
        num_classes_per_sample=1,
        num_classes_per_question=3,
    )
    question = (
        "<image>\nIn the picture provided, can you show where d x, the leg of the dog and a is "
        "with a segmentation mask?"
    )
    assert actual == [((question, f"{SEG}, {SEG} and {SEG}."), (3, 1, 0))]


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_candidates_are_sampled_only_at_the_limit(count):
    class Counting(PhiloxSampler):
        subsets = 0

        def subset(self, n: int, size: int) -> list[int]:
            self.subsets += 1
            return super().subset(n, size)

        def permutation(self, n: int) -> list[int]:
            return super().subset(n, n)

    sampler = Counting(seed=0, epoch=0, index=0)
    compose(
        example("names", targets=targets(*"abcdefghij"[:count])),
        sampler,
        ComposeSettings(),
        group_text=SEG,
    )
    assert sampler.subsets == (count >= 9)


WHY = "It is {seg} {big} because."
TURNS = [Turn("The {Big} one", None, (0,)), Turn("B", None, (0,)), Turn("C", None, (0,))]
EXPLAINED = [turn._replace(answer=WHY) for turn in TURNS]


def reasoning(kind: str, turns: Sequence[Turn]) -> Example:
    return example(kind, targets=(Target((), 0),), conversations=conversations(*turns))


def test_reasoning_without_explanation():
    script = ScriptedSampler([0, 2], 1, 0, 0, 4)
    assert run(script, reasoning("short", TURNS), num_classes_per_sample=2) == [
        (("<image>\nPlease segment the the {big} one in this image.", f"It is {SEG}."), (0,)),
        (("<image>\nCan you segment the c in this image?", f"{SEG}."), (0,)),
    ]
    script = ScriptedSampler(3, 2)  # fewer texts than the limit: no subset is sampled
    assert run(script, reasoning("long", TURNS[:1]), expanded=True) == [
        (("<image>\nThe {Big} one Output the segmentation mask.", f"Sure, it is {SEG}."), (0,)),
    ]


@pytest.mark.parametrize(
    ("decisions", "question", "answer", "masks"),
    [
        ((0.4, False, 1, 1), "The {Big} one Please output segmentation mask.", f"Sure, {SEG}.", 1),
        (
            (0.4, True, 1, 1, 2),
            "The {Big} one Please output segmentation mask and give some explanation.",
            f"Sure, {SEG}. {WHY}",
            1,
        ),
        ((0.39, 1), "The {Big} one", WHY, 0),
    ],
    ids=["mask", "mask and explanation", "explanation"],
)
def test_reasoning_modes(decisions, question, answer, masks):
    actual = run(ScriptedSampler(*decisions), reasoning("long", EXPLAINED[:1]), explanatory=0.4)
    assert actual == [((f"<image>\n{question}", answer), (0,) * masks)]


def test_explanations_can_be_switched_off():
    actual = run(ScriptedSampler(0, 0), reasoning("long", EXPLAINED[:1]), explanatory=None)
    assert actual[0][0][1] == f"It is {SEG}."


def test_text_without_explanation_keeps_its_mask():
    mixed = reasoning("short", [EXPLAINED[0], TURNS[1]])
    actual = run(ScriptedSampler(0.0, 0, 0, 0), mixed, explanatory=0.1)
    assert actual[0] == (("<image>\nThe {Big} one", WHY), ())
    assert actual[1][1] == (0,)


def muse(*turns: Turn) -> Example:
    named = targets(("The Big {dog}", "Dog_a"), "cat", masks=[4, 2])
    return example("muse", targets=named, conversations=conversations(*turns))


def test_muse_by_hand():
    text = Turn("Who {barks}?", "The cat {seg} does, {seg} {not} {}.", (1, 0))
    assert run(ScriptedSampler(1), muse(text)) == [
        (
            (
                "<image>\nWho {barks}? Please output segmentation mask.",
                f"The cat {SEG} does, {SEG} {{not}} {{}}.",
            ),
            (2, 4),
        )
    ]
    without_answer = Turn("Who?", None, (0, 1, 0))
    separate = ScriptedSampler(4, 0.11, 0.0, 0.1, True, 0)
    assert run(separate, muse(without_answer), expanded=True) == [
        (
            (
                "<image>\nWho? Please show the segmentation mask.",
                f"The Big {{dog}} is {SEG}, cat is {SEG} and Dog_a is {SEG}.",
            ),
            (4, 2, 4),
        )
    ]
    joint = ScriptedSampler(0, 0.5, 0.5, 0.5, False, 4)
    assert run(joint, muse(without_answer))[0][0][1] == (
        f"the segmentation result of the big {{dog}}, cat, the big {{dog}} are {SEG}, {SEG} and "
        f"{SEG}."
    )
    single = ScriptedSampler(0, 0.5, False, 1)
    assert run(single, muse(Turn("Who?", None, (1,))))[0][0][1] == f"cat are {SEG}."


def test_every_question_of_muse_is_asked():
    turns = [Turn(f"Question {i}?", "{seg}", (i % 2,)) for i in range(11)]
    actual = run(ScriptedSampler(*[0] * 11), muse(*turns), num_classes_per_sample=1)
    assert [masks for _, masks in actual] == [(4,), (2,)] * 5 + [(4,)]


def test_verbatim_kinds():
    turns = (Turn("A {seg}?", "{seg} {b}", (1,)), Turn("C?", "d"), Turn("E?", "{seg}{seg}", (0, 1)))
    ready = example("ready", targets=targets("x", "y"), conversations=(turns,))
    messages = ("<image>\nA {seg}?", f"{SEG} {{b}}", "C?", "d", "E?", SEG + SEG)
    assert run(ScriptedSampler(), ready) == [(messages, (1, 0, 1))]
    assert compose_evaluation(ready, group_text=SEG) == (
        Composed(messages, (1, 0, 1), ("y", "x", "y")),
    )
    talk = example("instruct", conversations=((Turn("A?", "{seg} { is text"), Turn("B?", "c")),))
    assert run(ScriptedSampler(), talk) == [(("<image>\nA?", "{seg} { is text", "B?", "c"), ())]


@pytest.mark.parametrize("kind", ["names", "short", "long", "muse", "instruct", "ready"])
def test_example_without_targets_gives_no_conversation(kind):
    sampler = PhiloxSampler(seed=0, epoch=0, index=0)
    assert compose(example(kind), sampler, ComposeSettings(), group_text=SEG) == ()
    assert compose_evaluation(example(kind), group_text=SEG) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (muse(Turn("Who?", "{seg} or {seg}", (0,))), "hold 2 groups for 1 targets"),
        (muse(Turn("Who?", "nobody", (0,))), "hold 0 groups for 1 targets"),
        (muse(Turn("Who?", f"{{seg}} {SEG}", (0,))), "hold 2 groups for 1 targets"),
        (muse(Turn("Who?", None)), "no targets and no answer"),
        (reasoning("long", [Turn("Who?")]), "no targets and no answer"),
        (example("instruct", conversations=conversations(Turn("Who?", SEG))), "1 groups for 0"),
        (
            example("ready", targets=targets("a"), conversations=conversations(Turn("?", "{seg}"))),
            "1 groups for 0",
        ),
    ],
)
def test_damaged_examples(given, message):
    with pytest.raises(DamagedError, match=message):
        compose(given, PhiloxSampler(seed=0, epoch=0, index=0), ComposeSettings(), group_text=SEG)


def test_unknown_kind():
    for call in (
        lambda e: compose(e, ScriptedSampler(), ComposeSettings(), group_text=SEG),
        lambda e: compose_evaluation(e, group_text=SEG),
    ):
        with pytest.raises(ValueError, match="'nonsense' is not one of the kinds names, short"):
            call(example("nonsense", conversations=conversations(Turn("A?", "b"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes_per_sample": 0}, "num_classes_per_sample=0 must be at least 1"),
        ({"num_classes_per_question": -1}, "num_classes_per_question=-1 must be at least 1"),
        ({"explanatory": 1.5}, "explanatory=1.5 must be None or between 0 and 1"),
    ],
)
def test_rejects_bad_settings(fields, message):
    with pytest.raises(InputError, match=message):
        ComposeSettings(**fields)


def test_evaluation_of_names():
    given = example("names", targets=targets(" Left Dog", ("{seg}", "x"), "c", masks=[2, 0, 2]))
    separate = compose_evaluation(given, group_text=SEG)
    assert separate[0] == Composed(
        (
            "<image>\n What is left dog in this image? Please output segmentation mask.",
            f"{SEG}.",
        ),
        (2,),
        ("left dog",),
    )
    assert [c.masks for c in separate] == [(2,), (0,), (2,)]
    joined = compose_evaluation(given, group_text=SEG, group=(2,))
    assert [(c.messages[1], c.masks) for c in joined] == [
        (f"{SEG} and {SEG}.", (2, 0)),
        (SEG, (2,)),
    ]
    assert joined[0].messages[0] == (
        "<image>\n What is left dog and {seg} in this image? Please output segmentation mask."
    )


def test_group_sizes_are_repeated():
    given = example("names", targets=targets(*(str(i) for i in range(23))))
    sizes = [len(c.masks) for c in compose_evaluation(given, group_text=SEG, group=(6, 5, 4))]
    assert sizes == [6, 5, 4, 6, 2]
    for group in ((), (6, 0)):
        with pytest.raises(ValueError, match="sizes of at least 1"):
            compose_evaluation(given, group_text=SEG, group=group)


def test_evaluation_of_texts():
    short, long = (
        compose_evaluation(reasoning(kind, EXPLAINED), group_text=SEG) for kind in ("short", "long")
    )
    end = "Please output segmentation mask."
    phrases = ("The {Big} one",)
    assert short == (
        Composed(
            (f"<image>\n What is The {{Big}} one in this image? {end}", f"{SEG}."), (0,), phrases
        ),
    )
    assert long == (Composed((f"<image>\n The {{Big}} one {end}", f"{SEG}."), (0,), phrases),)


def test_evaluation_of_muse():
    turns = Turn("A {?", "{seg}", (0,)), Turn("B?", None, (1, 0))
    end = "Please respond with segmentation mask."
    assert compose_evaluation(muse(*turns), group_text=SEG) == (
        Composed((f"<image>\nA {{? {end}", ""), (4,), ("The Big {dog}",)),
        Composed((f"<image>\nB? {end}", ""), (2, 4), ("cat", "The Big {dog}")),
    )


keys = st.builds(
    PhiloxSampler, seed=st.integers(0, 9), epoch=st.just(0), index=st.integers(0, 2**64 - 1)
)
sizes = st.integers(1, 4)


@given(keys, st.integers(1, len(NAMES)), sizes, sizes, st.booleans())
@settings(deadline=None)
def test_names_are_asked_once_each(sampler, count, questions, limit, expanded):
    """Also within the limits, in the order of their groups, with braces unchanged."""
    given = example("names", targets=targets(*NAMES[:count], masks=[i + 10 for i in range(count)]))
    setting = ComposeSettings(
        num_classes_per_sample=questions, num_classes_per_question=limit, expanded=expanded
    )
    composed = compose(given, sampler, setting, group_text=SEG)
    assert len(composed) == min(questions, count)
    all_phrases = [phrase for c in composed for phrase in c.phrases]
    assert len(set(all_phrases)) == len(all_phrases) == min(questions * limit, count)
    questions_possible = choices("names", expanded=expanded).questions
    for (question, answer), masks, phrases in composed:
        assert 1 <= len(masks) <= limit
        assert [NAMES[mask - 10] for mask in masks] == list(phrases)
        assert answer.count(SEG) == len(masks)
        *some, last = phrases
        joined = (f"{', '.join(some)} and {last}" if some else last).lower()
        possible = [f"<image>\n{q.replace('{name}', joined, 1)}" for q in questions_possible]
        assert question in possible
        if len(phrases) > 1 and all(phrase in answer for phrase in phrases):
            places = [answer.index(phrase) for phrase in phrases]
            assert places == sorted(places)


@given(st.integers(0, 2**64 - 1), st.permutations(range(6)))
@settings(deadline=None)
def test_text_does_not_depend_on_mask_indices(index, order):
    def composed(masks: Sequence[int]) -> tuple[Composed, ...]:
        given = example("names", targets=targets(*"abcdef", masks=masks))
        sampler = PhiloxSampler(seed=0, epoch=0, index=index)
        return compose(given, sampler, ComposeSettings(), group_text=SEG)

    plain, moved = composed(range(6)), composed(order)
    assert [c._replace(masks=()) for c in plain] == [c._replace(masks=()) for c in moved]
    assert [[order[m] for m in c.masks] for c in plain] == [list(c.masks) for c in moved]


KINDS = [
    example("names", targets=targets(*"abcdefghijkl", ("m n", "the n of the m"))),
    reasoning("short", EXPLAINED),
    reasoning("long", EXPLAINED * 2),
    muse(*[Turn("Who?", None, (0, 1))] * 3),
]


@pytest.mark.parametrize("given", KINDS, ids=lambda e: e.kind)
def test_same_key_same_conversations(given):
    def composed(**key: int) -> tuple[Composed, ...]:
        sampler = PhiloxSampler(**{"seed": 3, "epoch": 5, "index": 7, **key})
        return compose(given, sampler, ComposeSettings(explanatory=0.4), group_text=SEG)

    assert composed() == composed()
    for name in ("seed", "epoch", "index"):
        assert len({composed(**{name: i}) for i in range(20)}) > 3


def test_frequencies_of_explanation_modes():
    given = reasoning("long", EXPLAINED[:1])
    counts = {"alone": 0, "with": 0, "without": 0}
    for index in range(3000):
        sampler = PhiloxSampler(seed=0, epoch=0, index=index)
        (only,) = compose(given, sampler, ComposeSettings(explanatory=0.4), group_text=SEG)
        answer = only.messages[1]
        counts["alone" if answer == WHY else "with" if WHY in answer else "without"] += 1
    assert counts["alone"] == pytest.approx(1200, abs=120)
    assert counts["with"] == pytest.approx(900, abs=110)
    assert counts["without"] == pytest.approx(900, abs=110)


def test_another_group_text():
    given = example("names", targets=targets("a", "b"))
    sampler = PhiloxSampler(seed=0, epoch=0, index=0)
    composed = compose(given, sampler, ComposeSettings(), group_text="[SEG]")
    assert [c.messages[1].count("[SEG]") for c in composed] == [1, 1]
