"""Tests of the shapes dataset: rendering, questions, correct answers, tokenizer and batches."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.example import SEG
from data_pipeline.formats.masks import decode_many
from data_pipeline.loader import Loader, open_datasets
from data_pipeline.sources.shapes.dataset import SPLITS, Shapes
from data_pipeline.sources.shapes.phrases import NOTHING, NUMBERS
from data_pipeline.sources.shapes.questions import KINDS, TRAIN_KINDS
from data_pipeline.sources.shapes.scene import COLOURS, GRID, JITTER, MAX_HIDDEN, NOISE, SHAPES
from data_pipeline.sources.shapes.tokenizer import FOLDER, write
from pixellm_jax.batch import check
from pixellm_jax.config import CodebookConfig, LanguageConfig, ModelConfig, VisionConfig
from pixellm_jax.errors import InputError
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.prompt import PLAIN, encode_conversation
from pixellm_jax.text.vocabulary import Vocabulary
from tests.support.shapes_oracle import truth

SCENES = 300
NAMED = re.compile(r"(?:the|The) (\w+ \w+) \{seg\}")
PLACED = re.compile(r"\{seg\} ((?:at|in) the [a-z ]+?)(?=,| and |\.)")
LABELS = ("user", "assistant")
EMPTY = dict.fromkeys(("names", "attribute", "count", "superlative"), ("absent",))
EMPTY |= dict.fromkeys(("place", "half", "relation"), ("nowhere",))
EMPTY |= dict.fromkeys(("all but", "everything"), ())
"""Possible kinds of a question without targets, by the kind of its template."""

# Exact areas in radii squared; rasterisation deviates by a part of the outline.
AREAS = {
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.38**2,
    "cross": 4 * 1.12 * 0.72 - 0.72**2,
}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.with_codebook(FOLDER, tokens_per_scale=2, scales=2)


@cache
def generate_many(level, split="train", scenes=SCENES):
    return [Shapes(level=level, split=split).generate(i) for i in range(scenes)]


@pytest.fixture(params=["full", "simple"])
def generated(request):
    """Return the dataset of a level with many of its scenes and questions."""
    return Shapes(level=request.param), generate_many(request.param)


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)))


def digest(shapes, numbers):
    return hashlib.sha256(repr([shapes[i] for i in numbers]).encode()).hexdigest()


# Scenes


@pytest.mark.parametrize("level", ["full", "simple"])
def test_example_depends_only_on_its_index(level):
    shapes = Shapes(level=level, split="val")
    again = pickle.loads(pickle.dumps(shapes))
    assert [shapes[i] for i in range(9)] == [again[i] for i in reversed(range(9))][::-1]
    assert shapes[-1] == shapes[len(shapes) - 1] != shapes[0]
    assert shapes[np.int64(4)] == shapes[4]


def test_another_process_generates_the_same():
    code = (
        "from tests.data_pipeline.sources.test_shapes import *\n"
        "print(digest(Shapes(split='test'), range(5)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(Shapes(split="test"), range(5))


def test_splits_and_levels_have_different_images():
    sets = [Shapes(split=s, level=level) for s in SPLITS for level in ("full", "simple")]
    images = [shapes[i].image for shapes in sets for i in range(30)]
    assert len(set(images)) == len(images)
    assert [len(shapes) for shapes in sets[::2]] == [1 << 20, 1000, 1000]


@pytest.mark.parametrize("level", ["full", "simple"])
@pytest.mark.parametrize("side", [96, 131])
def test_masks_match_the_rendered_image(level, side):
    shapes = Shapes(level=level, side=side)
    for i in range(60):
        example = shapes[i]
        image, masks = pixels(example.image).astype(int), decode_many(example.masks)
        assert image.shape == (side, side, 3) and example.hw == (side, side)
        assert masks.shape == (len(example.targets), side, side)
        assert masks.sum(axis=0).max() == 1
        for target in example.targets:
            (name,) = target.phrases
            colour = np.asarray(COLOURS[name.split()[1]])
            off = np.abs(image[masks[target.mask] > 0] - colour)
            assert off.max() <= JITTER + NOISE // 2
        background = image[masks.max(axis=0) == 0]
        assert np.ptp(background, axis=1).max() <= 2 * JITTER
        # no colour of a shape occurs outside all masks
        assert min(abs(background - c).max(axis=1).min() for c in COLOURS.values()) > JITTER + NOISE


def test_things_match_their_attributes(generated):
    shapes, examples = generated
    off = []
    for scene, _, _ in examples:
        names = [thing.name for thing in scene.things]
        assert len(set(names)) == len(names)
        for mask, thing in zip(scene.masks(), scene.things, strict=True):
            y, x = np.nonzero(mask)
            assert thing.visible == len(y) >= max(40, (1 - MAX_HIDDEN) * thing.area)
            assert thing.x % (GRID * shapes.side / 96) == thing.y % (GRID * shapes.side / 96) == 0
            assert thing.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            assert thing.area == pytest.approx(AREAS[thing.shape] * thing.radius**2, rel=0.12)
            assert (thing.radius > 11) == (thing.size == "large")
            if thing.visible == thing.area:
                off.append([x.mean() + 0.5 - thing.x, y.mean() + 0.5 - thing.y])
    assert np.abs(off).max() < 1
    assert np.abs(np.mean(off, axis=0)).max() < 0.1  # pixel centres, not corners


def test_large_things_show_more_pixels_than_small_ones():
    things = [thing for scene, _, _ in generate_many("full") for thing in scene.things]
    shown = {size: [t.visible for t in things if t.size == size] for size in ("small", "large")}
    assert min(shown["large"]) > max(shown["small"])


def test_numbers_of_things(generated):
    shapes, examples = generated
    counts = Counter(len(scene.things) for scene, _, _ in examples)
    hidden = [any(t.visible < t.area for t in scene.things) for scene, _, _ in examples]
    assert set(counts) == set(range(2, 7 if shapes.level == "full" else 5))
    assert min(counts.values()) > SCENES / 12
    assert 0.5 < np.mean(hidden) < 0.9 if shapes.level == "full" else not any(hidden)


# Questions


def test_answers_agree_with_the_oracle(generated):
    shapes, examples = generated
    for scene, questions, _ in examples:
        assert len({q.question for q in questions}) == shapes.questions
        for q in questions:
            form, targets, doubt = truth(q.question, scene.things, shapes.side)
            assert (set(q.targets), doubt) == (targets, ""), q
            assert form == q.kind or (q.kind in EMPTY[form] and not targets), q


def test_answers_name_their_targets_in_order(generated):
    _, examples = generated
    for scene, questions, _ in examples:
        for q in questions:
            things = [scene.things[i] for i in q.targets]
            places = [q.question.find(thing.name) for thing in things]
            known = [(list(COLOURS).index(t.colour), SHAPES.index(t.shape)) for t in things]
            order = places if q.kind == "names" else known
            assert order == sorted(order)
            assert NAMED.findall(q.answer) == [thing.name for thing in things]
            assert q.answer.count(SEG) == len(things)
            assert (q.answer == NOTHING) == (q.kind in ("absent", "nowhere")) == (not things)
            stated = [word for word in re.findall(r"\w+", q.answer.lower()) if word in NUMBERS]
            assert stated in ([], [NUMBERS[len(things)]])
            if q.kind == "count":
                assert stated
            verb = re.search(r"\b(?:is|are)\b", q.answer)
            if verb and things and "number is" not in q.answer:
                assert verb[0] == ("is" if len(things) == 1 else "are"), q


def test_answers_state_the_cell_of_a_target(generated):
    shapes, examples = generated
    num_placed = 0
    for scene, questions, _ in examples:
        for q in questions:
            stated = PLACED.findall(q.answer)
            if not stated:
                continue
            assert len(stated) == len(q.targets)
            for i, words in zip(q.targets, stated, strict=True):
                thing, third = scene.things[i], shapes.side / 3
                row = ("top", "", "bottom")[(thing.y >= third) + (thing.y >= 2 * third)]
                column = ("left", "", "right")[(thing.x >= third) + (thing.x >= 2 * third)]
                where = " ".join(filter(None, (row, column)))
                assert words == (f"at the {where}" if where else "in the middle")
                num_placed += 1
    assert num_placed > SCENES or shapes.level == "simple"


def test_oracle_notices_a_wrong_answer():
    """A useful oracle contradicts answers about a scene that has changed."""
    contradicted = Counter()
    for scene, questions, _ in generate_many("full"):
        turned = [
            t._replace(
                x=96 - t.x,
                y=96 - t.y,
                radius=100 - t.radius,
                colour={"red": "blue", "blue": "red"}.get(t.colour, t.colour),
                shape={"circle": "square", "square": "circle"}.get(t.shape, t.shape),
            )
            for t in scene.things
        ]
        for q in questions:
            _, targets, doubt = truth(q.question, turned, 96)
            contradicted[q.kind] += targets != set(q.targets) or bool(doubt)
    assert {kind for kind, count in contradicted.items() if count} == set(KINDS) - {"everything"}


@pytest.mark.parametrize(("split", "kinds"), [("train", TRAIN_KINDS), ("test", KINDS)])
def test_frequencies_of_kinds_and_target_counts(split, kinds):
    shapes = Shapes(split=split)
    questions = [q for _, sampled, _ in generate_many("full", split, 1000) for q in sampled]
    counts_by_kind = Counter(q.kind for q in questions)
    for kind, weight in kinds.items():  # many scenes rule out "relation": things are too close
        share = weight / sum(kinds.values())
        assert 0.6 * share < counts_by_kind[kind] / len(questions) < 1.3 * share, kind
    counts = Counter(len(q.targets) for q in questions)
    assert set(counts) == set(range(7)) and min(counts.values()) > len(questions) / 100
    assert shapes.kinds(3) == tuple(q.kind for q in shapes.generate(3).questions)


def test_simple_questions_name_at_most_three_things():
    questions = [q for _, sampled, _ in generate_many("simple") for q in sampled]
    assert {q.kind for q in questions} == {"names"}
    assert {len(q.targets) for q in questions} == {1, 2, 3}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_number_of_questions_and_targets(count):
    shapes = Shapes(questions=count)
    for i in range(40):
        conversations = shapes[i].conversations
        assert len(conversations) == count
        assert sum(len(turn.targets) for (turn,) in conversations) <= max(6, 3 * count)


# Tokenizer


def test_tokenizer_files_are_up_to_date(tmp_path):
    write(tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_vocabulary_appends_its_tokens(vocabulary, tmp_path):
    assert [vocabulary.unk, vocabulary.bos, vocabulary.eos] == [0, 1, 2]
    base = vocabulary.size - 6
    assert vocabulary.codebook == ((base, base + 1), (base + 2, base + 3))
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path, scales=2)
    text = f"USER: Segment the red circle. ASSISTANT: Sure, {vocabulary.group_text}.</s>"
    assert again.encode(text) == vocabulary.encode(text) and again.size == vocabulary.size


def test_every_text_round_trips_through_the_tokenizer(generated, vocabulary):
    _, examples = generated
    for scene, questions, _ in examples:
        for q in questions:
            messages = [f"<image>\n{q.question}", q.answer.replace(SEG, vocabulary.group_text)]
            encoded = encode_conversation(vocabulary, PLAIN, messages, images=1)
            assert vocabulary.unk not in encoded.ids
            answer = read_answer(vocabulary, encoded.ids[encoded.loss_mask])
            assert answer.text == q.answer.lower().replace(SEG, "[SEG]")
            names = [f"the {scene.things[i].name}" for i in q.targets]
            assert [answer.text[a:b] for a, b in answer.phrases] == names


def test_every_token_is_used(vocabulary):
    texts = [t for _, sampled, _ in generate_many("full") for q in sampled for t in q[1:3]]
    used = {index for text in texts for index in vocabulary.encode(text.replace(SEG, ""))}
    names = {token for token, index in vocabulary.ids.items() if index not in used}
    assert names - set(vocabulary.added) == {"<unk>", "</s>", *LABELS}


def test_upper_case_and_unknown_words(vocabulary):
    known = vocabulary.encode("segment the red circle.")
    assert vocabulary.encode("Segment the  RED circle .") == known
    assert vocabulary.encode("segment the mauve circle.")[3] == vocabulary.unk


# Batches

MODEL = ModelConfig(
    vision=VisionConfig(canvas=96, patch=8, table=12),
    language=LanguageConfig(
        vocabulary=Vocabulary.with_codebook(FOLDER, tokens_per_scale=2, scales=2).size
    ),
    codebook=CodebookConfig(tokens_per_scale=2, scales=2),
    image_grid=6,
    template="plain",
)
DATA = DataConfig(
    families=(
        FamilyConfig(weight=3.0, datasets=("shapes/train",)),
        FamilyConfig(weight=1.0, datasets=("shapes_simple/train",)),
    ),
    batch=16,
    length=288,
    targets=15,
    masks=48,
)


def test_batches_drop_no_conversation(vocabulary):
    loader = Loader(DATA, MODEL, vocabulary, open_datasets(DATA, None))
    start = time.perf_counter()
    for _ in range(12):
        batch = next(loader)
        check(batch, MODEL)
        assert (batch.segment.max(axis=1) == 5).all()
    loader.close()
    print(f"{12 * 16 / (time.perf_counter() - start):.0f} examples per second")
    assert loader.counts["examples"] == 12 * 16
    assert loader.counts["conversations over budget"] == loader.counts["damaged examples"] == 0


def test_only_shapes_need_no_folder(tmp_path):
    families = (FamilyConfig(weight=1.0, datasets=("shapes/val", "shapes_simple/test")),)
    opened = open_datasets(DataConfig(families=families), None)
    assert opened == {
        "shapes/val": Shapes(split="val"),
        "shapes_simple/test": Shapes(split="test", level="simple"),
    }
    assert opened["shapes_simple/test"][3].dataset == "shapes_simple"
    families = (FamilyConfig(weight=1.0, datasets=("shapes/val", "muse/train")),)
    with pytest.raises(InputError, match=r"muse/train.*`pixellm prepare`"):
        open_datasets(DataConfig(families=families), None)
    with pytest.raises(InputError, match="pixellm prepare"):
        open_datasets(DataConfig(families=families), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "testA"}, "no split 'testA'; choose from train, val, test"),
        ({"level": "hard"}, "no level 'hard'; choose from simple, full"),
        ({"side": 63}, "side=63 must be at least 64"),
        ({"questions": 0}, "questions=0 must be 1 to 8"),
        ({"questions": 9}, "questions=9 must be 1 to 8"),
    ],
)
def test_errors_list_the_valid_options(options, message):
    with pytest.raises(InputError, match=message):
        Shapes(**options)


@pytest.mark.parametrize("index", [1000, -1001])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"shapes/val has no example {index} of 1000"):
        Shapes(split="val")[index]
