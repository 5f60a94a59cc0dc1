"""A small model that learns a few real photos by heart: does everything fit together?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from data_pipeline.benchmarks import BENCHMARKS, list_images, read_questions
from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.formats.masks import decode_many
from data_pipeline.loader import Loader
from data_pipeline.sources import SOURCES
from pixellm_jax.config import MeshConfig, ModelConfig
from pixellm_jax.evaluation.free_running import answer_free_running
from pixellm_jax.evaluation.scoring import make_record
from pixellm_jax.evaluation.summary import Summary, summarise
from pixellm_jax.experiments.shapes_recipe import demo_recipe
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.sharding import make_mesh
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.training.checkpoints import CHECKPOINTS
from pixellm_jax.training.config import OptimizerConfig, TrainConfig
from pixellm_jax.training.export import write_model
from pixellm_jax.training.loop import Outcome, fit
from pixellm_jax.training.state import make_blueprint
from pixellm_jax.training.validation import Validation, validate
from pixellm_jax.weights import checkpoint
from tests.support.small_training import EVERYTHING

MUSE = "muse"
SPLITS = ("train", "val", "test_less", "test_many")
WORDS = r"\w+|[^\w\s]"


def read_photos(root: Path, count: int) -> list[Example]:
    """The photos of MUSE whose smallest object is largest, by its share of the picture."""
    source = SOURCES[MUSE].source
    found: list[tuple[float, Example]] = []
    for split in SPLITS:
        for entry in source.entries(root, split):
            try:
                example = source.read(entry).example
            except DamagedError:
                continue
            y, x = example.hw
            shares = decode_many(example.masks).reshape(len(example.masks), -1).sum(1) / (y * x)
            found.append((float(shares.min()), example))
    found.sort(key=lambda pair: -pair[0])
    return [example for _, example in found[:count]]


def write_tokenizer(examples: Sequence[Example], folder: Path) -> None:
    """One token per word of the photos' questions and answers; other words are `<unk>`."""
    texts = [
        f"{turn.question} {turn.answer or ''}" for e in examples for (turn,) in e.conversations
    ]
    texts += [phrase for e in examples for target in e.targets for phrase in target.phrases]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = sorted({*re.findall(WORDS, " ".join(texts).lower()), *["user", "assistant", ":", "."]})
    ids = {token: number for number, token in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.add_special_tokens(list(special.values()))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def photo_train() -> TrainConfig:
    """The training, but for its length."""
    return TrainConfig(
        lora=None,
        trainable=EVERYTHING,
        frozen=(),
        optimizer=OptimizerConfig(
            method="muon", learning_rate=1e-3, b2=0.98, warmup=50, schedule="cosine"
        ),
        mesh=MeshConfig(fsdp=1),
        log_every=10,
        keep_last=1,
        keep_best=0,
    )


def learn_photos(root: Path, out: Path, *, photos: int, steps: int, evaluate_every: int) -> Outcome:
    """Trains on the photos, and evaluates on the same ones, the words of the answers given."""
    examples = read_photos(root, photos)
    write_tokenizer(examples, out / "tokenizer")
    vocabulary = Vocabulary.with_codebook(
        out / "tokenizer", **dataclasses.asdict(demo_recipe().model.codebook)
    )
    config = photo_model(vocabulary.size)
    train = dataclasses.replace(
        photo_train(), steps=steps, evaluate_every=evaluate_every, save_every=steps
    )
    data = DataConfig(
        families=(FamilyConfig(weight=1.0, datasets=(MUSE,)),),
        batch=4,
        length=512,
        targets=24,
        masks=64,
    )
    seen = dataclasses.replace(data, masks=0)
    mesh = make_mesh(train.mesh, jax.local_devices()[:1])
    load = partial(Loader, model=config, vocabulary=vocabulary, datasets={MUSE: examples})

    def evaluate(model: object) -> Validation:
        batches = load(seen)
        try:
            once = itertools.islice(batches, photos // data.batch)
            return validate(model, once, mesh, train.loss)
        finally:
            batches.close()

    batches = load(data)
    try:
        return fit(make_blueprint(config, train), batches, run=out, mesh=mesh, evaluate=evaluate)
    finally:
        batches.close()


def answer_photos(root: Path, run: Path, *, photos: int) -> Summary:
    """What the model of a finished run says of its own photos, in its own words."""
    vocabulary = Vocabulary.with_codebook(
        run / "tokenizer", **dataclasses.asdict(demo_recipe().model.codebook)
    )
    blueprint = make_blueprint(photo_model(vocabulary.size), photo_train())
    (last,) = (run / CHECKPOINTS).iterdir()
    write_model(run, int(last.name), run / "model", blueprint, vocabulary)
    model = prepare_for_inference(checkpoint.load_model(run / "model"))
    engine = Engine(model, vocabulary, EngineConfig(max_batch=16, max_new_tokens=256))
    wanted = {(example.split, example.key) for example in read_photos(root, photos)}
    asked = [
        question
        for split in SPLITS
        for entry in list_images(BENCHMARKS[MUSE], root, split)
        if (split, entry.key) in wanted
        for question in read_questions(BENCHMARKS[MUSE], root, split, entry).questions
    ]
    assert len({question.picture for question in asked}) == photos
    left_out: dict[str, str] = {}
    answers = answer_free_running(
        engine, vocabulary, asked, Stopwatch("io", rest="model"), left_out
    )
    records = [make_record(answer, given=False) for answer in answers]
    assert len(records) == len(asked) and not left_out
    return summarise(records)


def photo_model(vocabulary: int) -> ModelConfig:
    """Return the model of `pixellm demo --train` for larger images: two million parameters.

    Masks have a quarter of the canvas's resolution.
    """
    small = demo_recipe().model
    vision = dataclasses.replace(small.vision, width=128, mlp=512, patch=14, canvas=224, table=16)
    language = dataclasses.replace(small.language, vocabulary=vocabulary, max_positions=1024)
    return dataclasses.replace(small, vision=vision, language=language)
