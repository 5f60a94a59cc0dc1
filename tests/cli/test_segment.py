"""`pixellm segment` with many questions: results as they come, and resumed as if never stopped."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from pixellm_jax.cli import segment
from pixellm_jax.cli.main import main
from pixellm_jax.inference.predictor import Predictor

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three pictures, and a file that is none of a picture's."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.jpg", "c.PNG")):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def questions(photos) -> Path:
    """Seven questions about them."""
    lines = [
        {"image": name, "question": f"Where is {thing}?"}
        for name in ("a.jpg", "b.png", "c.PNG")
        for thing in ("it", "the dog")
    ]
    path = photos / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in [*lines, lines[0]]))
    return path


@pytest.fixture
def load(predictor, monkeypatch) -> list[dict]:
    """The predictor of the session in place of a fresh one; the options it was asked for."""
    asked = []

    def load(path, **options):
        asked.append({"path": path, **options})
        return predictor

    monkeypatch.setattr(Predictor, "load", load)
    return asked


def options(tiny, out: Path, *more: object) -> list[str]:
    return ["segment", "--checkpoint", str(tiny.jax), "--out", str(out), *map(str, more)]


def records(out: Path) -> dict[int, dict]:
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({record["number"] for record in found}) == len(found)
    return {record["number"]: record for record in found}


def test_lines_of_questions_are_answered(tiny, questions, tmp_path, capfd, load):
    out = tmp_path / "new" / "answers"
    assert main(options(tiny, out, "--questions", questions, "--batch", 4)) == 0
    printed, err = capfd.readouterr()
    assert err == ""
    assert printed == f"{out / 'answers.jsonl'}: 7 questions, 0 without an answer\n"
    found = records(out)
    assert sorted(found) == list(range(7))
    for number, name in enumerate(["a.jpg"] * 2 + ["b.png"] * 2 + ["c.PNG"] * 2 + ["a.jpg"]):
        record = found[number]
        assert record["image"] == name
        assert record["text"] == "It is [SEG]." and record["reason"] == "stop"
        with Image.open(questions.parent / name) as image:
            assert record["size"] == [image.height, image.width]
        (target,) = record["targets"]
        mask = coco.decode(target["segmentation"])
        assert list(mask.shape) == record["size"] and mask.sum() == target["area"]
        with Image.open(out / "overlays" / f"{number:06d}.png") as overlay:
            assert overlay.format == "PNG"
    assert load[0]["max_batch"] == 4


def test_a_folder_is_asked_picture_by_picture(tiny, photos, tmp_path, capfd, load):
    out = tmp_path / "out"
    arguments = options(tiny, out, "--image", photos, "--question", "Where is the dog?")
    assert main([*arguments, "--min-score", "0.3", "--dtype", "float32", "--weights", "int8"]) == 0
    capfd.readouterr()
    assert [record["image"] for _, record in sorted(records(out).items())] == [
        "a.jpg",
        "b.png",
        "c.PNG",
    ]
    assert {record["question"] for record in records(out).values()} == {"Where is the dog?"}
    assert load == [
        {
            "path": tiny.jax,
            "dtype": "float32",
            "mesh": None,
            "max_new_tokens": 512,
            "max_batch": 16,
            "min_score": 0.3,
            "weights": "int8",
        }
    ]


@pytest.mark.parametrize("cut", ["nothing", "a line", "in a line", "all"])
def test_a_stopped_run_goes_on(tiny, questions, tmp_path, capfd, load, predictor, monkeypatch, cut):
    out = tmp_path / "out"
    command = options(tiny, out, "--questions", questions)
    assert main(command) == 0
    whole = records(out)
    path = out / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = {"nothing": 7, "a line": 6, "in a line": 3, "all": 0}[cut]
    path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:30] if cut == "in a line" else b""))
    asked = []
    each = predictor.each
    monkeypatch.setattr(predictor, "each", lambda pairs: each(asked.append(p) or p for p in pairs))
    assert main(command) == 0
    assert len(asked) == 7 - kept
    again = records(out)
    assert sorted(again) == sorted(whole)
    for number, record in again.items():
        assert record["text"] == whole[number]["text"]
        assert record["image"] == whole[number]["image"]
    assert path.read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]
    # What was done needs no model.
    loads = len(load)
    assert main(command) == 0
    assert len(load) == loads
    capfd.readouterr()


def test_a_bad_picture_is_a_line_with_an_error(tiny, questions, tmp_path, capfd, load):
    (questions.parent / "b.png").write_bytes(b"cut")
    out = tmp_path / "out"
    assert main(options(tiny, out, "--questions", questions)) == 0
    printed, err = capfd.readouterr()
    assert printed.endswith("7 questions, 2 without an answer\n")
    assert err.count("b.png") >= 2
    found = records(out)
    assert [n for n in range(7) if "error" in found[n]] == [2, 3]
    assert "b.png" in found[2]["error"] and "targets" not in found[2]
    # It is tried again, and what was answered is not.
    assert main(options(tiny, out, "--questions", questions)) == 0
    assert capfd.readouterr().out.endswith("7 questions, 2 without an answer\n")
    Image.new("RGB", (30, 20)).save(questions.parent / "b.png")
    answered = (out / "answers.jsonl").read_text().splitlines()[:5]
    assert main(options(tiny, out, "--questions", questions)) == 0
    assert capfd.readouterr().out.endswith("7 questions, 0 without an answer\n")
    assert (out / "answers.jsonl").read_text().splitlines()[:5] == answered
    assert not any("error" in record for record in records(out).values())


def test_names_that_are_no_text_and_odd_line_ends_are_kept_apart(tiny, tmp_path, capfd, load):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    (folder / "a.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    command = options(tiny, tmp_path / "out", "--image", folder, "--question", "Where?")
    assert main(command) == main(command) == 0
    assert [record["image"] for record in records(tmp_path / "out").values()] == ["caf?.png"]
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    line = {"image": "a.png", "question": "Where\u2028is\x85it?"}
    (folder / "asked.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    command = options(tiny, tmp_path / "more", "--questions", folder / "asked.jsonl")
    assert main(command) == main(command) == 0
    (record,) = map(
        json.loads, (tmp_path / "more/answers.jsonl").read_text("utf-8").split("\n")[:-1]
    )
    assert record["question"] == line["question"]
    capfd.readouterr()


def test_answers_of_other_settings_are_left_alone(tiny, questions, tmp_path, capfd, load):
    command = options(tiny, tmp_path / "out", "--questions", questions)
    assert main(command) == 0
    assert "answers with weights None, now 'int8'" in refusal(capfd, *command, "--weights", "int8")
    (tmp_path / "out/answers.jsonl").write_text("")  # of no answers, settings may change
    assert main([*command, "--weights", "int8"]) == 0
    capfd.readouterr()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--batch", "0", "--batch 0: expected at least 1"),
        ("--max-new-tokens", "-1", "--max-new-tokens -1: expected at least 1"),
        ("--min-score", "70", "--min-score 70.0: expected a probability"),
        ("--tensor", "0", "--tensor 0: expected at least 1"),
    ],
)
def test_bad_options_leave_nothing_behind(tiny, questions, tmp_path, capfd, option, value, named):
    command = options(tiny, tmp_path / "out", "--questions", questions, option, value)
    assert named in refusal(capfd, *command)
    assert not (tmp_path / "out").exists()


def test_weights_are_shared_by_several_devices(tiny, photos, tmp_path, capfd):
    texts = []
    for count in ("1", "2"):
        command = options(tiny, tmp_path / count, "--image", photos / "a.jpg", "--question", "Hm?")
        assert main([*command, "--tensor", count, "--max-new-tokens", "8"]) == 0
        texts.append(json.loads((tmp_path / count / "answer.json").read_text())["text"])
    assert texts[0] == texts[1]
    command = options(tiny, tmp_path / "9", "--image", photos / "a.jpg", "--question", "Hm?")
    assert "--tensor 9: 8 devices are here" in refusal(capfd, *command, "--tensor", "9")


def test_damaged_answers_are_tried_again(
    tiny, questions, tmp_path, capfd, load, predictor, monkeypatch
):
    out, each = tmp_path / "out", predictor.each

    def damaged(pairs):
        for number, answer in each(pairs):
            yield number, answer._replace(finish_reason="non_finite") if number < 2 else answer

    with monkeypatch.context() as patched:
        patched.setattr(predictor, "each", damaged)
        assert main(options(tiny, out, "--questions", questions)) == 0
    assert capfd.readouterr().out.endswith("7 questions, 2 without an answer\n")
    assert "not finite" in records(out)[0]["error"]
    assert main(options(tiny, out, "--questions", questions)) == 0
    assert capfd.readouterr().out.endswith("7 questions, 0 without an answer\n")


def test_a_disk_that_is_full_is_one_line(tiny, questions, tmp_path, capfd, load, monkeypatch):
    def full(picture, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    command = options(tiny, tmp_path / "out", "--questions", questions)
    assert main(command) == 2
    _, err = capfd.readouterr()
    assert "000000.png: writing failed (No space left on device)" in err
    assert "Traceback" not in err


def refusal(capfd, *arguments: str) -> str:
    capfd.readouterr()
    assert main(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"image": "a.jpg", "question": " "}', "the question is empty"),
        ('{"image": "a.jpg"}', "KeyError 'question'; write lines like"),
        ('{"image": 3, "question": "Where?"}', "expected two strings"),
        ("[1, 2", "write lines like"),
        ("[1, 2]", "write lines like"),
    ],
)
def test_bad_lines_are_named_before_the_model_is_read(
    tiny, questions, tmp_path, capfd, monkeypatch, line, named
):
    monkeypatch.setattr(segment, "_load", lambda options: pytest.fail("it was read"))
    text = questions.read_text()
    questions.write_text(text + line + "\n")
    err = refusal(capfd, *options(tiny, tmp_path / "out", "--questions", questions))
    assert f"{questions}:15: " in err and named in err
    assert not (tmp_path / "out").exists()


def test_an_empty_question_is_refused_before_the_model_is_read(
    tiny, photos, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(segment, "_load", lambda options: pytest.fail("it was read"))
    for image in (photos, photos / "a.jpg"):
        command = options(tiny, tmp_path / "out", "--image", image, "--question", " ")
        assert "the question is empty" in refusal(capfd, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), "name --image and --question, or --questions"),
        (("--image", "a.jpg"), "name --image and --question, or --questions"),
        (("--questions", "a.jsonl", "--question", "Hm?"), "leave --image and --question"),
        (("--questions", "no.jsonl"), "no.jsonl: cannot be read"),
    ],
)
def test_what_is_asked_must_be_named(tiny, tmp_path, capfd, more, named):
    assert named in refusal(capfd, *options(tiny, tmp_path / "out", *more))


def test_answers_to_other_questions_are_left_alone(tiny, questions, photos, tmp_path, capfd, load):
    out = tmp_path / "out"
    assert main(options(tiny, out, "--questions", questions)) == 0
    before = (out / "answers.jsonl").read_bytes()
    command = options(tiny, out, "--image", photos, "--question", "Where?")
    assert "holds answers to other questions" in refusal(capfd, *command)
    assert (out / "answers.jsonl").read_bytes() == before
    (out / "answers.jsonl").write_text('{"a": 3}\n')
    line = refusal(capfd, *options(tiny, out, "--questions", questions))
    assert "not a file of answers" in line
