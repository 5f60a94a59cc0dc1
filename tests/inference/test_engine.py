"""Engine: batched and jump-forward decoding equal plain decoding, with few compilations."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pixellm_jax.inference.engine as module
from pixellm_jax.batch import Batch
from pixellm_jax.images.geometry import fit
from pixellm_jax.inference import compilation, decoding
from pixellm_jax.inference.compilation import CompileCounter
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.inference.request import Completion, Request
from pixellm_jax.text.prompt import TEMPLATES, question_ids

# Float32 with sums in another order, relative to the largest value; two layers and the pixel
# decoder amplify rounding (1e-7) by two orders of magnitude at most.
TOLERANCE = 2e-5

WORDS = ("dog", "image", "segment", "is", "It", "this", "in", "Please", "the")
CONFIG = EngineConfig(max_batch=4, max_new_tokens=40, mask_batch=1, max_tokens_per_step=100)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def error(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()) if wanted.size else 0.0


def assert_same(found: Completion, wanted: Completion) -> None:
    """Equal ids, and numbers within `TOLERANCE`; the caller compares the numbers of steps."""
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert found.finish_reason == wanted.finish_reason
    np.testing.assert_array_equal(found.targets.codebook_index, wanted.targets.codebook_index)
    assert error(found.targets.states, wanted.targets.states) < TOLERANCE
    assert error(found.targets.mask_logits, wanted.targets.mask_logits) < TOLERANCE


@pytest.fixture(scope="module")
def model(varied):
    return prepare_for_inference(varied.model)


@pytest.fixture(scope="module")
def pictures(varied) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Noise images of several shapes on the canvas."""
    draw, canvas = np.random.default_rng(0), varied.model.config.vision.canvas
    shapes = [(50, 70), (90, 40), (64, 64), (30, 110), (112, 112)]
    return [fit(draw.integers(0, 256, (*hw, 3), np.uint8), canvas) for hw in shapes]


@pytest.fixture(scope="module")
def ask(varied, pictures):
    """Returns a function that makes a request about an image."""

    def ask(words: str, picture: int = 0, **options) -> Request:
        tokens = question_ids(
            varied.vocabulary,
            TEMPLATES[varied.model.config.template],
            words,
            image_tokens=varied.model.config.image_tokens,
        )
        return Request(tokens, *pictures[picture], **options)

    return ask


@pytest.fixture(scope="module")
def questions(ask) -> list[Request]:
    draw = np.random.default_rng(0)
    return [ask(" ".join(draw.choice(WORDS, draw.integers(1, 12))), i // 4) for i in range(20)]


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """All engines that the fixture `engine` made."""
    return []


@pytest.fixture(scope="module")
def engine(varied, model, engines):
    """Returns a function that makes an engine with `CONFIG` and the given changes."""

    def engine(**changes) -> Engine:
        config = dataclasses.replace(CONFIG, **changes)
        engines.append(Engine(model, varied.vocabulary, config))
        return engines[-1]

    return engine


@pytest.fixture(scope="module")
def alone(engine, questions, varied) -> list[Completion]:
    """Completions of single requests by plain decoding; codebook tokens occur only in groups."""
    one = engine(max_batch=1, jump_forward=False)
    results = [result for question in questions for _, result in one.generate([question])]
    for result in results:
        codebook = np.isin(result.tokens[:-5], varied.vocabulary.group).nonzero()[0]
        in_groups = varied.vocabulary.find_groups(result.tokens)
        assert set(codebook) <= set(in_groups.ravel())
    return results


# Identity


def test_requests_cover_all_outcomes(alone):
    assert {result.finish_reason for result in alone} == {"stop", "length"}
    assert {len(result.targets.codebook_index) for result in alone} >= {0, 1, 2, 3}
    assert len({result.tokens.tobytes() for result in alone}) > 10


def test_cached_decoding_equals_a_teacher_forced_pass(varied, questions, alone):
    """Ids, probabilities, hidden states and masks are equal."""
    length, slots = 256, 4
    rows = [i for i, result in enumerate(alone) if len(result.targets.codebook_index) >= 2][:3]
    assert len(rows) == 3
    tokens, segment = np.zeros((3, length), np.int32), np.full((3, length), -1, np.int32)
    index = np.zeros((3, slots, *alone[0].targets.codebook_index.shape[1:]), np.int32)
    for row, i in enumerate(rows):
        whole = np.concatenate([questions[i].tokens, alone[i].tokens])
        tokens[row, : len(whole)], segment[row, : len(whole)] = whole, 0
        found = alone[i].targets.codebook_index
        index[row, : len(found)] = len(questions[i].tokens) + found - 1
    batch = Batch(
        image=np.stack([questions[i].canvas for i in rows]),
        image_hw=np.asarray([questions[i].hw for i in rows], np.int32),
        tokens=tokens,
        segment=segment,
        position=np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)),
        loss_mask=np.zeros((3, length), bool),
        codebook_index=index,
        masks=np.zeros((3, slots, 2, 2), np.uint8),
        target_valid=np.ones((3, slots), bool),
        target_conversation=np.zeros((3, slots), np.int32),
    )
    said = jax.jit(lambda model, batch: model(batch))(varied.model, batch)
    for row, i in enumerate(rows):
        result, before = alone[i], len(questions[i].tokens) - 1
        logits = said.text_logits[row, before : before + len(result.tokens)]
        np.testing.assert_array_equal(logits.argmax(-1), result.tokens)
        assert error(result.token_prob, jax.nn.softmax(logits).max(-1)) < TOLERANCE
        for m, found in enumerate(result.targets.codebook_index):
            assert error(result.targets.states[m], said.hidden[row][before + found]) < TOLERANCE
            assert error(result.targets.mask_logits[m], said.mask_logits[row, m]) < TOLERANCE


def test_batched_and_jump_forward_decoding_equal_plain_decoding(engine, questions, alone):
    group = 6
    ways = {"plain": False, "one by one": True, "at once": True}
    for way, jump_forward in ways.items():
        together = engine(
            jump_forward=jump_forward, max_tokens_per_step=100 if way == "at once" else 0
        )
        results = dict(together.generate(questions))
        assert sorted(results) == list(range(len(questions)))  # none lost, none twice
        for number, wanted in enumerate(alone):
            assert_same(results[number], wanted)
            saved = (group - 1) * len(wanted.targets.codebook_index) if way == "at once" else 0
            if (
                wanted.finish_reason == "stop" or not jump_forward
            ):  # else a group may have been cut off
                assert results[number].num_steps == wanted.num_steps - saved
        # Rows are refilled: far fewer passes than one by one.
        assert together.num_steps < sum(result.num_steps for result in alone) / 2


def test_a_limit_inside_a_group_truncates_it_as_in_plain_decoding(engine, questions, alone):
    number = next(i for i, result in enumerate(alone) if len(result.targets.codebook_index))
    start = int(alone[number].targets.codebook_index[0, 0, 0])
    budgets = range(start + 1, start + 9)
    asked = [questions[number]._replace(max_new_tokens=budget) for budget in budgets]
    results = dict(engine().generate(asked))
    for i, budget in enumerate(budgets):
        found = results[i]
        np.testing.assert_array_equal(found.tokens, alone[number].tokens[:budget])
        whole = budget >= start + 6
        assert len(found.targets.codebook_index) == whole
        assert found.finish_reason == ("stop" if found.tokens[-1] == 2 else "length")
        if whole:
            wanted = alone[number].targets.mask_logits[:1]
            assert error(found.targets.mask_logits, wanted) < TOLERANCE


def test_jump_forward_completes_groups_that_plain_decoding_breaks(varied, model, ask, engine):
    broken = jax.tree.map(lambda leaf: leaf, model)
    head, group = broken.language_model.head, varied.vocabulary.group
    head.set_value(jnp.asarray(head[...]).at[group[3]].set(0.0))  # never said by itself
    asked = [ask(words) for words in ("dog", "image", "It is this", "Please")]
    found = {}
    for jump_forward in (False, True):
        config = dataclasses.replace(CONFIG, jump_forward=jump_forward)
        results = dict(Engine(broken, varied.vocabulary, config).generate(asked))
        found[jump_forward] = [results[i] for i in range(len(asked))]
    assert sum(group[0] in result.tokens for result in found[False]) >= 2
    assert not any(len(result.targets.codebook_index) for result in found[False])
    for result in found[True]:
        codebook = [int(token) for token in result.tokens if token in group]
        whole, rest = divmod(len(codebook), len(group))
        assert codebook == [*group] * whole + [*group[:rest]]
        assert rest == 0 or result.finish_reason == "length"
        assert len(result.targets.codebook_index) == whole


# Scheduling


def test_an_image_is_encoded_once_for_all_its_requests(engine, questions, monkeypatch):
    read = Counter()

    def counted(counter, function, *arguments, **options):
        if function in (decoding.encode, decoding.read_prefix):
            read[function.__name__] += len(np.unique(np.asarray(arguments[1]), axis=0))
        return function(*arguments, **options)

    monkeypatch.setattr(CompileCounter, "call", counted)
    busy = engine()
    list(busy.generate(questions))
    assert read["encode"] == read["read_prefix"] == 5
    list(busy.generate(questions[::-1]))  # and is still known
    assert read["encode"] == 5


def test_evicted_images_are_encoded_again(engine, questions, alone):
    few = engine(image_cache_size=1)
    results = dict(few.generate(questions[::4] * 2))
    for i, result in results.items():
        assert_same(result, alone[4 * (i % 5)])


def test_other_requests_of_the_same_shapes_compile_nothing(engine, questions):
    list(engine().generate(questions))
    again = engine()
    results = list(again.generate(reversed(questions)))
    assert len(results) == len(questions)
    assert not again.counter.compiled


def test_compilations_are_bounded_by_buckets(engine, questions, engines):
    """Compilations of all engines of this file do not grow with the number of requests."""
    list(engine().generate(questions))
    compiled = sum((one.counter.compiled for one in engines), Counter())
    rows, lengths, capacities, prefixes, fast = {1, 4}, {32, 64}, {128, 256}, {128}, {0, 1}
    assert compiled["prefill"] <= len(rows) * (len(lengths) + len(prefixes))
    assert compiled["decode"] <= len(rows) * len(capacities) * len(fast)
    assert compiled["encode"] <= len(rows)
    assert compiled["decode_masks"] <= 1


def test_requests_join_and_leave_at_any_step(engine, questions, alone):
    """One request is added after every step, and some are aborted."""
    late, numbers, results = engine(steps_per_sync=3), {}, {}
    for number, question in enumerate(questions[:12]):
        numbers[late.add_request(question)] = number
        if number in (3, 7):
            late.abort(next(ticket for ticket, other in numbers.items() if other == number - 1))
        results |= late.step()
    while not late.idle:
        results |= late.step()
    found = {numbers[ticket]: result for ticket, result in results.items()}
    assert set(range(12)) - {2, 6} <= set(found)
    for number, result in found.items():
        assert_same(result, alone[number])
    assert late.step() == []


def test_the_batch_shrinks_when_rows_finish(engine, questions, alone):
    """The last row finishes in a batch of one, with an unchanged answer."""
    sizes, shrinking = [], engine(jump_forward=False)
    order = sorted(range(len(alone)), key=lambda i: len(alone[i].tokens))
    chosen = [order[0], order[1], order[2], order[-1]]
    short, long = (len(alone[i].tokens) for i in (order[2], order[-1]))
    assert long > 2 * short
    tickets, results, alone_for = {}, {}, 0
    for i in chosen:
        tickets[shrinking.add_request(questions[i])] = i
    while not shrinking.idle:
        before = shrinking.num_steps
        results |= shrinking.step()
        sizes.append(len(shrinking._slots))
        alone_for += (shrinking.num_steps - before) * (sizes[-1] == 1)
    assert sizes[0] == 4 and sizes == sorted(sizes, reverse=True)
    assert alone_for >= long - short - 1  # of its passes, all after the last one that ended
    for ticket, i in tickets.items():
        assert_same(results[ticket], alone[i])


def test_an_engine_works_after_all_requests_are_aborted(engine, questions, alone):
    stopped = engine(steps_per_sync=1)
    tickets = [stopped.add_request(question) for question in questions[:6]]
    stopped.step()
    for ticket in tickets:
        stopped.abort(ticket)
    assert stopped.idle
    assert stopped.step() == []
    ((_, result),) = stopped.generate(questions[:1])
    assert_same(result, alone[0])


def test_a_single_request_after_a_batch_uses_a_batch_of_one(engine, questions):
    """One step fits the group of one row, but not the groups of four rows."""
    fresh, used = engine(max_tokens_per_step=6), engine(max_tokens_per_step=6)
    list(used.generate(questions))
    ((_, wanted),) = fresh.generate(questions[:1])
    ((_, found),) = used.generate(questions[:1])
    assert len(wanted.targets.codebook_index) > 0
    assert found.num_steps == wanted.num_steps


def test_the_cache_grows_with_long_answers(engine, questions, alone, monkeypatch):
    monkeypatch.setattr(compilation, "CAPACITY_UNIT", 32)
    monkeypatch.setattr(module, "HEADROOM", 8)
    number = max(range(len(alone)), key=lambda i: alone[i].num_steps)
    assert len(alone[number].tokens) == CONFIG.max_new_tokens
    grown, capacities = engine(max_batch=1), set()
    grown.add_request(questions[number])
    while not grown.idle:
        results = grown.step()
        capacities |= {grown._state.valid.shape[1]} if grown._state else set()
    assert len(capacities) >= 2
    assert_same(results[0][1], alone[number])


# Streams and conversations


def test_a_stream_yields_text_at_once_and_masks_with_their_group(
    engine, questions, alone, monkeypatch
):
    monkeypatch.setattr(module, "STREAM_STEPS_PER_SYNC", 1)
    number = max(range(len(alone)), key=lambda i: alone[i].targets.codebook_index[:, 0, 0].sum())
    wanted = alone[number]
    assert len(wanted.targets.codebook_index) >= 2
    asked = [questions[i]._replace(stream=i == number) for i in (number, 0, 1)]
    parts = [result for i, result in engine().generate(asked) if i == 0]
    assert len(parts) > 5
    assert {part.finish_reason for part in parts[:-1]} == {"running"}
    assert len({len(part.targets.codebook_index) for part in parts[:-1]}) >= 2
    for part, following in zip(parts, parts[1:], strict=False):
        assert len(part.tokens) < len(following.tokens) or following is parts[-1]
        np.testing.assert_array_equal(part.tokens, following.tokens[: len(part.tokens)])
        # The masks of a group come one pass after its ids, which is when its states are known.
        ended = int((wanted.targets.codebook_index[:, -1, -1] < len(part.tokens)).sum())
        assert len(following.targets.codebook_index) >= ended
        count = len(part.targets.codebook_index)
        assert error(part.targets.mask_logits, wanted.targets.mask_logits[:count]) < TOLERANCE
    assert_same(parts[-1], wanted)


def test_a_follow_up_equals_the_whole_conversation_prefilled(engine, questions, ask):
    first, second = (
        ask("dog image")._replace(keep_context=True),
        np.asarray([40, 50, 60, 70], np.int32),
    )
    talk = engine()
    ((_, said),) = talk.generate([first])
    follow = np.concatenate([said.tokens[-1:], second])
    both = [Request(follow, context=said.context, keep_context=True), ask("It is")]
    results = dict(talk.generate(both))
    whole = first._replace(
        tokens=np.concatenate([first.tokens, said.tokens, second]), keep_context=False
    )
    ((_, wanted),) = engine().generate([whole])
    assert_same(results[0], wanted)


# Drawing


def test_sampling_depends_on_the_seed_and_not_on_the_batch(engine, questions, alone):
    warm = [question._replace(temperature=1.0, seed=3) for question in questions[:6]]
    together = dict(engine().generate([*warm, *questions[6:]]))
    for number, question in enumerate(warm[:3]):
        ((_, found),) = engine().generate([question])
        np.testing.assert_array_equal(found.tokens, together[number].tokens)
    for number in range(6, len(questions)):  # the others are as greedy as ever
        np.testing.assert_array_equal(together[number].tokens, alone[number].tokens)
    drawn = engine().generate([warm[0]._replace(seed=seed) for seed in range(8)])
    assert len({result.tokens.tobytes() for _, result in drawn}) > 4
    cold = [question._replace(temperature=1e-3, seed=9) for question in questions[:6]]
    for number, result in engine().generate(cold):
        np.testing.assert_array_equal(result.tokens, alone[number].tokens)


# Bad input


def test_a_prompt_longer_than_the_context_is_refused(engine, ask, varied):
    limit = varied.model.config.language.max_positions
    with pytest.raises(ValueError, match=f"the model has {limit}"):
        engine().add_request(ask("dog " * limit))


def test_an_answer_ends_at_the_end_of_the_context(engine, questions, alone, monkeypatch):
    number = next(i for i, result in enumerate(alone) if len(result.tokens) > 7)
    positions = len(questions[number].tokens) + 7
    monkeypatch.setattr(Engine, "_max_positions", positions)
    ((_, result),) = engine().generate([questions[number]])
    np.testing.assert_array_equal(result.tokens, alone[number].tokens[:7])
    assert result.finish_reason == "length"


def test_non_finite_values_do_not_affect_other_rows(varied, model, questions, alone, ask):
    """One embedding is NaN: only requests with its token fail, and reused rows are clean."""
    damaged = jax.tree.map(lambda leaf: leaf, model)
    word = questions[0].tokens[-3]
    unharmed = [
        i
        for i, question in enumerate(questions)
        if word not in question.tokens and word not in alone[i].tokens
    ]
    harmed = [i for i, question in enumerate(questions) if word in question.tokens]
    embedding = damaged.language_model.embedding
    embedding.set_value(jnp.asarray(embedding[...]).at[word].set(jnp.nan))
    results = dict(Engine(damaged, varied.vocabulary, CONFIG).generate(questions))
    assert len(results) == len(questions)
    assert len(harmed) >= 4 and len(unharmed) >= 4
    for number in harmed:
        assert results[number].finish_reason == "non_finite"
        assert len(results[number].tokens) == 0
        assert len(results[number].targets.codebook_index) == 0
    for number in unharmed:
        assert_same(results[number], alone[number])


def test_a_hundred_targets(varied, model, ask, monkeypatch):
    """The head makes the first codebook token follow the last one: target after target."""
    eager = jax.tree.map(lambda leaf: leaf, model)
    language, group = eager.language_model, varied.vocabulary.group
    last = language.embedding[...][group[-1]]
    head = np.array(language.head[...])
    head[group[0]] += 9 * last / np.linalg.norm(last)
    language.head.set_value(head)
    monkeypatch.setattr(module, "HEADROOM", 620)
    many = dataclasses.replace(CONFIG, max_batch=1, max_new_tokens=620)
    ((_, result),) = Engine(eager, varied.vocabulary, many).generate([ask("dog segment")])
    assert len(result.targets.codebook_index) >= 100
    assert np.isfinite(result.targets.mask_logits).all()
    assert len({logits.tobytes() for logits in result.targets.mask_logits}) > 50
    assert result.num_steps < len(result.tokens) / 4
