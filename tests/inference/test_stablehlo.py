"""Exported programs answer as the predictor does, in a process that has no model code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from PIL import ExifTags, Image
from safetensors.numpy import load_file

from pixellm_jax.cli.main import main
from pixellm_jax.errors import InputError
from pixellm_jax.images import geometry
from pixellm_jax.images.read import read_image
from pixellm_jax.inference import stablehlo_runner
from pixellm_jax.inference.predictor import Predictor
from pixellm_jax.inference.stablehlo import PLATFORMS, Buckets, describe_tokenizer, write_programs
from pixellm_jax.inference.stablehlo_runner import Runner, RunnerError, Tokenizer
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.vocabulary import Vocabulary
from tests.support.tiny_checkpoint import change_json

# The same float32 programs, cut and fused in other places: logits differ by about 1e-5 of the
# largest. One pixel in a thousand is so near to zero.
PIXELS = 1e-3
TOLERANCE = 1e-3

NEW_TOKENS = 20
BUCKETS = Buckets(batch=(2,), question=(32,), targets=(2,), new_tokens=NEW_TOKENS)
QUESTIONS = (
    "Please segment the dog.",
    "image the dog is dog",
    "the this in segment Please",
    "is It image",
    "segment",
)

# What a machine that only runs the programs does not have.
ABSENT = ("pixellm_jax", "data_pipeline", "flax", "orbax", "transformers")
OUTSIDE = f"""
import json, sys
for name in {ABSENT}:
    sys.modules[name] = None
import numpy as np
import run
assert run.main(["picture.png", {QUESTIONS[0]!r}, "--out", "said"]) == 0
runner = run.Runner(sys.path[0])
inputs = np.load("inputs.npz")
pairs = [(inputs[name], question) for name in inputs for question in {QUESTIONS}]
out = dict(
    fast=runner.batch(pairs),
    plain=runner.batch(pairs[:5], fast_forward=False),
    drawn=runner.batch(pairs[:5], temperature=1.0, top_p=0.9, seed=7),
)
for name, answers in out.items():
    arrays = [a._asdict() for a in answers]
    np.savez(name, **{{f"{{i}} {{k}}": v for i, a in enumerate(arrays) for k, v in a.items()}})
"""


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Noise of two shapes."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*hw, 3), np.uint8) for hw in ((50, 70), (90, 40))]


@pytest.fixture(scope="module")
def written(varied, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("programs") / "out"
    write_programs(varied.model, varied.vocabulary, out, buckets=BUCKETS)
    return out


@pytest.fixture(scope="module")
def outside(written, pictures, tmp_path_factory) -> Path:
    """A folder with what `run.py` answered, alone."""
    folder = tmp_path_factory.mktemp("outside")
    Image.fromarray(pictures[0]).save(folder / "picture.png")
    np.savez(folder / "inputs.npz", *pictures)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(written), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUTF8": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    script = f"import sys; sys.path.insert(0, {str(written)!r})\n{OUTSIDE}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, "utf-8")
    return folder


@pytest.fixture(scope="module")
def inside(varied, pictures):
    """Results and answers of the predictor for the pairs of `OUTSIDE`, drawn as told."""
    predictor = Predictor(varied.model, varied.vocabulary, max_new_tokens=NEW_TOKENS, max_batch=2)
    pairs = [(picture, question) for picture in pictures for question in QUESTIONS]

    def answers(**draw):
        requests = [predictor.prepare(*pair, **draw)[0] for pair in pairs]
        futures = [predictor.service.submit(request) for request in requests]
        completions = [future.result() for future in futures]
        return [
            (completion, predictor.answer_builder(picture)(completion))
            for (picture, _), completion in zip(pairs, completions, strict=True)
        ]

    return answers


def read(folder: Path, name: str) -> list[dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(folder / f"{name}.npz") as arrays:
        for key in arrays:
            number, field = key.split()
            found.setdefault(int(number), {})[field] = arrays[key]
    return [found[i] for i in range(len(found))]


def assert_alike(found, wanted) -> None:
    result, answer = wanted
    np.testing.assert_array_equal(found["ids"], result.tokens)
    assert (str(found["text"]), str(found["reason"])) == (answer.text, answer.finish_reason)
    assert found["masks"].shape == answer.masks.shape
    if answer.masks.size:
        assert np.mean(found["masks"] != answer.masks) < PIXELS
    np.testing.assert_allclose(found["scores"], answer.scores, rtol=TOLERANCE)
    np.testing.assert_allclose(found["presence"], answer.presence, rtol=TOLERANCE)


def test_programs_answer_as_the_predictor(outside, inside):
    found, wanted = read(outside, "fast"), inside()
    assert len(found) == len(wanted) == 2 * len(QUESTIONS)
    assert len({len(answer.masks) for _, answer in wanted}) > 1  # not all the same
    for one, other in zip(found, wanted, strict=True):
        assert_alike(one, other)
        assert one["passes"] == other[0].num_steps


def test_draws_are_those_of_the_predictor(outside, inside):
    found, wanted = read(outside, "drawn"), inside(temperature=1.0, top_p=0.9, seed=7)
    assert any(a["text"] != b["text"] for a, b in zip(found, read(outside, "fast"), strict=False))
    for one, other in zip(found, wanted, strict=False):
        assert_alike(one, other)


def test_plain_decoding_says_the_same_in_more_passes(outside):
    fast, plain = read(outside, "fast"), read(outside, "plain")
    complete = 0
    for one, other in zip(plain, fast, strict=False):
        if len(other["masks"]) == len(one["masks"]):  # not so where plain decoding breaks groups
            np.testing.assert_array_equal(one["ids"], other["ids"])
            assert one["passes"] >= other["passes"]
            complete += len(one["masks"])
    assert complete
    assert sum(int(a["passes"]) for a in plain) > sum(int(a["passes"]) for a in fast[:5])


def test_run_py_says_and_writes_the_answer(outside):
    first = read(outside, "fast")[0]
    said = (outside / "stdout").read_text("utf-8")
    assert said.split() == str(first["text"]).split()
    record = json.loads((outside / "said" / "answer.json").read_text())
    assert (record["text"], record["ids"]) == (str(first["text"]), first["ids"].tolist())
    masks = sorted((outside / "said").glob("mask_*.png"))
    assert len(masks) == len(first["masks"])
    for file, mask in zip(masks, first["masks"], strict=True):
        with Image.open(file) as png:
            np.testing.assert_array_equal(np.asarray(png), 255 * mask.astype(np.uint8))


def test_weights_are_stored_once_and_passed_by_name(written):
    manifest = json.loads((written / "manifest.json").read_text())
    stored = load_file(written / "weights" / "model.safetensors")
    described = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in stored.items()}
    assert described == manifest["weights"]
    used = set[str]()
    for program in manifest["programs"].values():
        used |= set(program["weights"])
        size = (written / program["file"]).stat().st_size
        assert size < sum(stored[name].nbytes for name in program["weights"])
    assert used == stored.keys()


def test_programs_are_for_every_platform_and_as_the_manifest_says(written):
    manifest = json.loads((written / "manifest.json").read_text())
    names = ["encode_b2", "prefill_b2_t32", "decode_b2_t32", "plain_b2_t32", "masks_m2"]
    assert list(manifest["programs"]) == names
    for program in manifest["programs"].values():
        exported = jax.export.deserialize(bytearray((written / program["file"]).read_bytes()))
        assert exported.platforms == PLATFORMS
        weights = [manifest["weights"][name] for name in program["weights"]]
        described = [*weights, *program["inputs"].values()]
        shapes = [(tuple(each["shape"]), each["dtype"]) for each in described]
        assert [(aval.shape, str(aval.dtype)) for aval in exported.in_avals] == shapes


TEXTS = (
    "Where is the cup?",
    "  two  blanks\n\nand\tlines ",
    "typed </s> marks [SEG0]  [SEG1]and <s>more <im_end>\n x",
    "▁ umlauts äöü and 漢字 🙂",
    "",
)


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_is_the_vocabulary(copied, legacy):
    folder = copied("jax") / "tokenizer"
    change_json(folder / "tokenizer_config.json", legacy=legacy)
    vocabulary = Vocabulary.load(folder, scales=2)
    tokenizer = Tokenizer(folder, {"tokenizer": describe_tokenizer(vocabulary)})
    for text in TEXTS:
        assert tokenizer.encode(text) == vocabulary.encode(text, bos=False)
    assert tokenizer.words == set(vocabulary.known - vocabulary.marks)


def test_text_is_that_of_the_answer(written, varied):
    runner, vocabulary = Runner(written), varied.vocabulary
    draw, group = np.random.default_rng(0), list(vocabulary.group)
    words = sorted(vocabulary.known)
    for _ in range(200):
        parts = [group if draw.random() < 0.3 else [int(draw.choice(words))] for _ in range(9)]
        ids = np.asarray(sum(parts, []), np.int32)
        assert runner._read(ids) == read_answer(vocabulary, ids).text


def rotated(file, rgb):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(rgb).save(file, exif=exif)


def half_transparent(file, rgb):
    alpha = np.full((*rgb.shape[:2], 1), 100, np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(file)


def grey16(file, rgb):
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 200).save(file)


def palette(file, rgb):
    Image.fromarray(rgb).quantize(16).save(file)


@pytest.mark.parametrize("save", [rotated, half_transparent, grey16, palette])
def test_pictures_are_read_alike(tmp_path, pictures, save):
    save(tmp_path / "a.png", pictures[0])
    found = stablehlo_runner.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(found, read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("hw", [(50, 70), (90, 40), (7, 300), (112, 112)])
def test_canvas_is_the_same(hw):
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 256, (*hw, 3), np.uint8)
    (found, size), (canvas, fitted) = stablehlo_runner.fit(picture, 112), geometry.fit(picture, 112)
    np.testing.assert_array_equal(found, canvas)
    assert size == fitted
    logits = draw.standard_normal((1, 32, 32), np.float32)
    back = stablehlo_runner.unfit(logits[0], hw, 112)
    # The two products are the same, but a library may add up their terms in another order.
    np.testing.assert_allclose(back, geometry.unfit(logits, hw, 112)[0], atol=1e-5)


def test_what_the_runner_refuses(written, pictures, tmp_path):
    runner = Runner(written)
    for question, message in (("  ", "of words"), ("dog " * 40, "up to 32")):
        with pytest.raises(RunnerError, match=message):
            runner(pictures[0], question)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(RunnerError, match=r"a\.png"):
        runner(tmp_path / "a.png", QUESTIONS[0])
    with pytest.raises(RunnerError, match="elongated"):
        runner(np.zeros((1, 900, 3), np.uint8), QUESTIONS[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": ()}, "batch"),
        ({"question": (64, 32)}, "rising"),
        ({"targets": (0,)}, "targets"),
        ({"new_tokens": 0}, "new_tokens"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Buckets(**changes)


def test_questions_longer_than_the_model_are_refused(varied, tmp_path):
    with pytest.raises(InputError, match="has room for"):
        write_programs(
            varied.model, varied.vocabulary, tmp_path / "out", buckets=Buckets(question=(4000,))
        )
    assert not (tmp_path / "out").exists()


def test_command_refuses_in_one_line(tiny, tmp_path, capfd):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    checkpoint = ["export", "--checkpoint", str(tiny.jax)]
    for options, message in (
        (["--stablehlo", str(tmp_path / "taken")], "choose another place"),
        (["--stablehlo", str(tmp_path / "out"), "--batch", "4", "1"], "rising"),
        (["--hf", str(tmp_path / "out"), "--new-tokens", "9"], "--new-tokens goes with"),
    ):
        assert main([*checkpoint, *options]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_command_writes_a_folder(tiny, tmp_path, capfd):
    out = tmp_path / "out"
    options = ["--platforms", "cpu", "--new-tokens", "8", "--targets", "1", "--question", "16"]
    assert main(["export", "--checkpoint", str(tiny.jax), "--stablehlo", str(out), *options]) == 0
    assert f"{out}: 5 programs; python {out / 'run.py'}" in capfd.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["platforms"] == ["cpu"]
    source = Path(stablehlo_runner.__file__).read_bytes()
    assert (out / "run.py").read_bytes() == source


def test_masks_of_an_answer_before_are_taken_away(tmp_path):
    for count in (3, 1):
        zeros = np.zeros(count, np.float32)
        masks = np.zeros((count, 4, 5), bool)
        answer = stablehlo_runner.Answer("It.", [1], masks, zeros, zeros, "stop", 2)
        stablehlo_runner._write(tmp_path, answer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "mask_00.png"]
