"""Predictor: any image in, upright masks out, one-line errors."""

from __future__ import annotations

import re
import threading
from concurrent.futures import CancelledError
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from pixellm_jax.config import MeshConfig
from pixellm_jax.errors import InputError
from pixellm_jax.inference.answer import Answer, AnswerBuilder
from pixellm_jax.inference.predictor import MIN_NEW_TOKENS, Predictor
from pixellm_jax.inference.request import Completion, Targets
from pixellm_jax.sharding import make_mesh
from pixellm_jax.text.prompt import TEMPLATES, question_ids

HEIGHT, WIDTH = 53, 89


pytestmark = pytest.mark.usefixtures("quick_compilation")


QUESTION = "Please segment the dog."


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth image that is not its own mirror image."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / 7 + x / 31), np.cos(x / 11), np.sin(y / 13 - x / 5)], axis=-1)
    return (127.5 + 127.5 * waves).astype(np.uint8)


def assert_same(found: Answer, expected: Answer) -> None:
    """Compare bit for bit: the same programs ran."""
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def assert_alike(found: Answer, expected: Answer) -> None:
    """Compare text exactly, masks except pixels whose logit is almost 0.

    Sums in another order change float32 logits by about 1e-5; one pixel in a thousand is this
    near to zero.
    """
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    np.testing.assert_array_equal(found.markers, expected.markers)
    assert found.masks.shape == expected.masks.shape
    if found.masks.size:
        assert np.mean(found.masks != expected.masks) < 1e-3
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3)
    np.testing.assert_allclose(found.presence, expected.presence, rtol=1e-3)


def assert_proper(answer: Answer, height: int, width: int) -> None:
    """Check the invariants of every answer."""
    count = len(answer.masks)
    assert answer.masks.shape == (count, height, width) and answer.masks.dtype == np.bool_
    for name in ("scores", "presence"):
        numbers = getattr(answer, name)
        assert numbers.shape == (count,) and numbers.dtype == np.float32
        assert ((numbers >= 0) & (numbers <= 1)).all()
    np.testing.assert_array_equal(answer.kept, answer.masks.any(axis=(1, 2)))
    assert answer.spans.shape == answer.markers.shape == (count, 2)
    for mask, score in zip(answer.masks, answer.scores, strict=True):
        assert 0.5 < score <= 1 if mask.any() else score == 0
    for (begin, end), (first, last) in zip(answer.spans, answer.markers, strict=True):
        assert 0 <= begin <= end <= len(answer.text)
        assert answer.text[first:last] == "[SEG]"


@pytest.fixture(scope="module")
def answer(predictor) -> Answer:
    """The answer about `picture()`."""
    return predictor(picture(), QUESTION)


def test_answer_about_a_synthetic_image(answer):
    assert answer.text == "It is [SEG]."
    assert answer.complete
    assert len(answer.masks) == 1
    assert_proper(answer, HEIGHT, WIDTH)


def test_answer_about_a_photo(predictor, data_root):
    photos = sorted(data_root.glob("ade20k/images/training/*.jpg"))[:2]
    assert photos
    for photo in photos:
        answer = predictor(photo, QUESTION)
        assert answer.text == "It is [SEG]."
        with Image.open(photo) as image:
            assert_proper(answer, image.height, image.width)


def test_same_question_gets_the_same_answer(predictor, answer):
    assert_same(predictor(picture(), QUESTION), answer)


def test_mask_depends_on_the_picture(predictor, answer):
    other = predictor(picture()[:, ::-1].copy(), QUESTION)
    assert not np.array_equal(other.scores, answer.scores)


def test_path_image_and_array_are_the_same(predictor, answer, tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(picture()).save(file)
    for source in (file, str(file), Image.fromarray(picture()), Image.open(file)):
        assert_same(predictor(source, QUESTION), answer)


def grey16(file, rgb):
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(file)
    return np.repeat(rgb[..., :1], 3, axis=2)


def grey(file, rgb):
    Image.fromarray(rgb[..., 0]).save(file)
    return np.repeat(rgb[..., :1], 3, axis=2)


def rgba(file, rgb):
    alpha = np.zeros((*rgb.shape[:2], 1), np.uint8)
    alpha[: HEIGHT // 2] = 255
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(file)
    return np.where(alpha, rgb, 255).astype(np.uint8)


def palette(file, rgb):
    Image.fromarray(rgb // 64 * 64).quantize(64).save(file)
    with Image.open(file) as image:
        assert image.mode == "P"
        return np.asarray(image.convert("RGB"))


def cmyk(file, rgb):
    Image.fromarray(rgb).convert("CMYK").save(file.with_suffix(".tif"))
    file.with_suffix(".tif").rename(file)
    return rgb


@pytest.mark.parametrize("write", [grey, grey16, rgba, palette, cmyk], ids=lambda f: f.__name__)
def test_every_image_mode_is_read_as_displayed(predictor, tmp_path, write):
    file = tmp_path / "picture.png"
    seen = write(file, picture())
    assert_same(predictor(file, QUESTION), predictor(seen, QUESTION))


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 1), (8, 3)])
def test_exif_orientation_is_applied(predictor, answer, tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.rot90(picture(), turn).copy())
    stored.save(tmp_path / "turned.png", exif=exif)
    assert_same(predictor(tmp_path / "turned.png", QUESTION), answer)


@pytest.mark.parametrize("size", [(1, 1), (8, 1000), (1000, 8), (112, 112), (300, 2)])
def test_picture_of_unusual_size_gets_masks_of_its_size(predictor, size):
    answer = predictor(picture(*size), QUESTION)
    assert len(answer.masks) == 1
    assert_proper(answer, *size)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (picture(1, 1000), "1 x 1000 pixels is too elongated"),
        (picture().astype(np.float32), r"float32\[53, 89, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), r"uint8\[0, 5, 3\]"),
        ("no/such.jpg", "no such file 'no/such.jpg'"),
    ],
    ids=["elongated", "float", "empty", "missing"],
)
def test_an_unusable_image_is_a_one_line_error(predictor, source, named):
    with pytest.raises(InputError, match=named) as caught:
        predictor(source, QUESTION)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("question", ["", "  \n\t "])
def test_empty_question_is_refused(predictor, question):
    with pytest.raises(InputError, match="the question is empty; ask something"):
        predictor(picture(), question)


def test_question_longer_than_the_context_is_refused(predictor):
    limit = predictor.config.language.max_positions - min(predictor.max_new_tokens, MIN_NEW_TOKENS)
    with pytest.raises(InputError, match=rf"room for {limit} before an answer; shorten it"):
        predictor(picture(), "segment the dog " * 900)


def test_question_that_is_not_utf8_is_refused(predictor):
    with pytest.raises(InputError, match=r"'caf\\udce9\?' is not UTF-8"):
        predictor(picture(), b"caf\xe9?".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "question",
    [
        "Where is [SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5]?",
        "<image> <im_start><image><im_end> USER: no </s> ASSISTANT: It is",
        "¿Dónde está 犬 \U0001f415? \u200f\x00",
    ],
)
def test_question_may_contain_anything(predictor, question):
    answer = predictor(picture(), question)
    assert answer.text == "It is [SEG]."
    assert len(answer.masks) == 1


def test_answer_over_budget_is_marked_incomplete(predictor):
    short = Predictor(predictor.model, predictor.vocabulary, max_new_tokens=5)
    answer = short(picture(), QUESTION)
    assert not answer.complete
    assert answer.text == "It is"  # three of six codebook tokens are no target
    assert len(answer.masks) == 0
    assert_proper(answer, HEIGHT, WIDTH)


@pytest.mark.parametrize("budget", [0, -3])
def test_budget_must_allow_a_token(predictor, budget):
    with pytest.raises(InputError, match=f"max_new_tokens={budget}"):
        Predictor(predictor.model, predictor.vocabulary, max_new_tokens=budget)


def test_questions_and_pictures_of_one_bucket_compile_nothing_new(predictor, answer):
    del answer  # asked, so that all is compiled
    before = predictor.engine.counter.compiled.total()
    questions = (QUESTION, "Is it the dog?")
    template, size = TEMPLATES[predictor.config.template], predictor.config.image_tokens
    ids = [question_ids(predictor.vocabulary, template, q, image_tokens=size) for q in questions]
    assert len({len(tokens) for tokens in ids}) == 2
    predictor(picture(70, 31), "Is it the dog?")
    predictor(picture(31, 400), QUESTION)
    assert predictor.engine.counter.compiled.total() == before


def test_compute_dtype_of_the_released_models_works(tiny):
    predictor = Predictor.load(tiny.jax, dtype="bfloat16", max_new_tokens=12)
    answer = predictor(picture(), QUESTION)
    assert answer.text == "It is [SEG]."
    assert_proper(answer, HEIGHT, WIDTH)


# Many questions


def test_batch_keeps_the_order_and_equals_single_calls(varied):
    predictor = Predictor(varied.model, varied.vocabulary, max_new_tokens=40, max_batch=4)
    pairs = [
        (picture(*size), words)
        for size in ((53, 89), (20, 30))
        for words in ("the dog", "It is this image", "Please", "segment dog", "in")
    ]
    answers = predictor.batch(pairs)
    assert len({answer.text for answer in answers}) > 4
    assert len({len(answer.masks) for answer in answers}) > 2
    for (image, words), answer in zip(pairs, answers, strict=True):
        assert_proper(answer, *image.shape[:2])
        assert answer.num_steps <= answer.num_tokens
        assert_alike(answer, predictor(image, words))
    assert predictor.batch([]) == []


def test_an_unusable_pair_does_not_affect_others(predictor, answer):
    pairs = [(picture(), QUESTION), ("no/such.jpg", QUESTION), (picture(), " "), (picture(), "Hm?")]
    found = dict(predictor.each(pairs))
    assert sorted(found) == [0, 1, 2, 3]
    assert_alike(found[0], answer)
    assert isinstance(found[1], InputError) and "no such file" in str(found[1])
    assert isinstance(found[2], InputError) and "empty" in str(found[2])
    assert found[3].text == "It is [SEG]."
    with pytest.raises(InputError, match=r"pair 1: .*no such file 'no/such.jpg'"):
        predictor.batch(pairs)


def test_pairs_are_read_lazily(predictor):
    read = []

    def pairs():
        for i in range(100):
            read.append(i)
            yield picture(), QUESTION

    answers = predictor.each(pairs())
    next(answers)
    assert len(read) <= 2 * predictor.engine.config.max_batch
    answers.close()
    assert predictor(picture(), QUESTION).complete  # what was left is not answered first


def test_pairs_may_depend_on_answers(predictor, answer):
    def pairs():
        yield picture(), predictor(picture(), QUESTION).text.replace(" [SEG]", "")
        yield picture(), QUESTION

    found = dict(predictor.each(pairs()))
    assert found[0].text == "It is [SEG]."
    assert_alike(found[1], answer)


def test_answers_are_made_after_the_main_thread_has_ended(predictor, answer):
    predictor = Predictor(predictor.model, predictor.vocabulary)
    # As the interpreter does then, while other threads continue.
    predictor.service._post_processing.shutdown()
    assert_alike(predictor(picture(), QUESTION), answer)


def test_several_threads_share_a_predictor(predictor, answer):
    found: dict[int, Answer] = {}

    def ask(number: int) -> None:
        found[number] = predictor(picture(), QUESTION)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    later = [predictor.submit(picture(), QUESTION) for _ in range(5)]
    for thread in threads:
        thread.join()
    for one in (*found.values(), *(future.result() for future in later)):
        assert_alike(one, answer)
    assert len(found) == 12


def test_a_future_can_be_cancelled(predictor, answer):
    futures = [predictor.submit(picture(), QUESTION) for _ in range(40)]
    cancelled = [future for future in futures[1::2] if future.cancel()]
    assert cancelled
    for future in futures:
        if future in cancelled:
            with pytest.raises(CancelledError):
                future.result()
        else:
            assert_alike(future.result(), answer)


def test_a_stream_ends_in_the_answer(varied):
    predictor = Predictor(varied.model, varied.vocabulary, max_new_tokens=40, max_batch=1)
    words = "It is this image"
    whole = predictor(picture(), words)
    assert len(whole.masks)
    parts = list(predictor.stream(picture(), words))
    assert len(parts) > 2
    assert_same(parts[-1], whole)
    for part in parts[:-1]:
        assert part.finish_reason == "running" and not part.complete
        assert_proper(part, HEIGHT, WIDTH)
        assert whole.text.startswith(part.text.rstrip("\ufffd"))
        np.testing.assert_array_equal(part.masks, whole.masks[: len(part.masks)])
    stream = predictor.stream(picture(), words)
    next(stream)
    del stream  # the question is dropped
    assert_same(predictor(picture(), words), whole)
    with pytest.raises(InputError, match="empty"):
        predictor.stream(picture(), "")


def test_a_chat_equals_its_whole_text_prefilled(predictor):
    """The tiny model's ids equal the ids of its text, so that both can be compared."""
    talk = predictor.chat(picture())
    questions = ["Where is the dog?", "And the image?", "Is it in this?"]
    answers = [talk(question) for question in questions]
    history = []
    for question, answer in zip(questions, answers, strict=True):
        assert answer.text == "It is [SEG]."
        request, finish = predictor.prepare(picture(), question)
        tokens = question_ids(
            predictor.vocabulary,
            TEMPLATES[predictor.config.template],
            question,
            image_tokens=predictor.config.image_tokens,
            history=history,
        )
        wanted = predictor.service.submit(request._replace(tokens=tokens), finish).result()
        assert_alike(answer, wanted)
        history += [question, f"It is {predictor.vocabulary.group_text}."]
    assert [len(answer.earlier) for answer in answers] == [0, 1, 2]
    assert answers[2].earlier[0] is answers[0] and answers[2].earlier[1] is answers[1]
    np.testing.assert_array_equal(talk.masks, np.concatenate([a.masks for a in answers]))
    first = predictor(picture(), questions[1])
    assert np.abs(first.scores - answers[1].scores).max() > 0  # what was said before matters


@pytest.mark.parametrize("budget", range(3, 11))
def test_a_chat_continues_after_a_truncated_answer(predictor, budget):
    short = Predictor(predictor.model, predictor.vocabulary, max_new_tokens=budget)
    talk = short.chat(picture())
    first = talk("Where is the dog?")
    assert first.num_tokens == budget
    assert first.complete == (budget == 10)
    talk.predictor = predictor  # what was seen is the model's
    assert talk("And now?").text == "It is [SEG]."


def test_a_chat_refuses_unusable_questions(predictor):
    talk = predictor.chat(picture())
    talk("Where is the dog?")
    with pytest.raises(InputError, match="the question is empty"):
        talk(" ")
    with pytest.raises(InputError, match=r"the conversation makes a prompt of \d+ tokens"):
        talk("segment the dog " * 900)
    assert talk("And now?").text == "It is [SEG]."
    assert len(talk.answers) == 2


@pytest.mark.parametrize(
    "draw", [{"seed": np.int32(-5)}, {"seed": np.uint8(200)}, {"top_p": 1e-50}, {"seed": 2**70}]
)
def test_extreme_sampling_parameters_are_accepted(predictor, draw):
    answer = predictor(picture(), QUESTION, temperature=1e-3, **draw)
    assert answer.finish_reason in ("stop", "length") and answer.num_tokens > 1


def test_sampling_is_reproducible_by_seed(varied):
    predictor = Predictor(varied.model, varied.vocabulary, max_new_tokens=40, max_batch=4)
    texts = [predictor(picture(), "dog", temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    cold = predictor(picture(), "dog", temperature=1.0, top_p=1e-6, seed=5)
    assert cold.text == predictor(picture(), "dog").text


# Masks


def result(predictor: Predictor, logits: np.ndarray) -> Completion:
    """A completion of targets only, with these mask logits."""
    group, count = list(predictor.vocabulary.group), len(logits)
    index = np.arange(count * len(group), dtype=np.int32).reshape(count, 2, 3)
    chance = np.linspace(0.1, 0.9, count * len(group) + 1, dtype=np.float32)
    targets = Targets(index, np.zeros((count, 2, 3, 64), np.float32), logits.astype(np.float32))
    tokens = np.asarray([*group * count, predictor.vocabulary.eos], np.int32)
    return Completion(tokens, chance, targets, "stop", count + 1)


@pytest.mark.parametrize(
    "draw",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": 1e39},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": None},
        {"seed": 0.5},
    ],
)
def test_invalid_sampling_parameters_are_refused(predictor, draw):
    ((name, value),) = draw.items()
    talk = predictor.chat(picture())
    for ask in (partial(predictor.submit, picture()), partial(predictor.stream, picture()), talk):
        with pytest.raises(InputError, match=re.escape(f"{name}={value!r}: expected")):
            ask(QUESTION, **draw)


def test_scores_and_kept_masks(predictor):
    """Empty, uncertain, certain and non-finite masks, with and without a minimum score."""
    side = predictor.config.mask_grid
    logits = np.stack([np.full((side, side), value) for value in (-1.0, 0.1, 3.0, np.nan)])
    said = result(predictor, logits)
    for least, kept in ((0.0, [0, 1, 1, 0]), (0.9, [0, 0, 1, 0]), (1.0, [0, 0, 0, 0])):
        make = AnswerBuilder(predictor.vocabulary, (HEIGHT, WIDTH), 112, least)
        answer = make(said)
        assert answer.text == "[SEG] [SEG] [SEG] [SEG]"
        chances = 1 / (1 + np.exp([-0.1, -3.0]))
        np.testing.assert_allclose(answer.scores, [0, *chances, 0], rtol=1e-6)
        np.testing.assert_allclose(answer.presence, said.token_prob[:-1:6])
        assert answer.kept.tolist() == [bool(value) for value in kept]
        assert answer.masks.all(axis=(1, 2)).tolist() == answer.masks.any(axis=(1, 2)).tolist()
        assert answer.finish_reason == "non_finite"
    sound = AnswerBuilder(predictor.vocabulary, (HEIGHT, WIDTH), 112, 0.0)(
        result(predictor, logits[:3])
    )
    assert sound.finish_reason == "stop"


def test_a_stream_names_no_target_before_its_mask(predictor):
    said = result(predictor, np.ones((3, 32, 32)))
    targets = Targets(*(array[:1] for array in said.targets))
    make = AnswerBuilder(predictor.vocabulary, (HEIGHT, WIDTH), 112, 0.0)
    answer = make(said._replace(targets=targets, finish_reason="running"))
    assert answer.text == "[SEG]" and len(answer.masks) == 1
    assert len(make(said).masks) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"min_score": 1.5}, "min_score=1.5"),
        ({"weights": "int2"}, "int2"),
    ],
)
def test_bad_options_are_refused(predictor, options, named):
    with pytest.raises(InputError, match=named):
        Predictor(predictor.model, predictor.vocabulary, **options)


def test_weights_that_are_not_finite_are_named(tiny):
    damaged = Predictor.load(tiny.jax, max_new_tokens=12)
    weight = damaged.model.language_model.layers[1].up.weight
    weight.set_value(weight[...].at[3, 5].set(jnp.nan))
    with pytest.raises(InputError, match=r"language_model.layers.1.up.weight: .* not finite"):
        damaged(picture(), QUESTION)
    ((_, found),) = damaged.each([(picture(), QUESTION)])
    assert (found.finish_reason, found.text, len(found.masks)) == ("non_finite", "", 0)
    with pytest.raises(InputError, match="not finite"):
        damaged.chat(picture())(QUESTION)


def test_weights_on_a_mesh_give_the_same_answers(tiny, predictor, answer):
    """Heads, MLP and vocabulary are sharded over two devices: sums in another order."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    spread = Predictor.load(tiny.jax, max_new_tokens=12, max_batch=4, mesh=mesh)
    key = spread.model.language_model.layers[0].key.weight[...]
    assert [shard.data.shape for shard in key.addressable_shards] == [(64, 1, 16)] * 2
    assert_alike(spread(picture(), QUESTION), answer)
    for found in spread.batch([(picture(), QUESTION)] * 3):
        assert_alike(found, answer)
