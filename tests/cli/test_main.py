"""The command line: complete results, one line for bad input, no partial output left behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import pixellm_jax.cli.convert as convert_command
from pixellm_jax.cli.main import COMMANDS as COMMAND_TABLE
from pixellm_jax.cli.main import main
from pixellm_jax.inference.answer import Answer
from pixellm_jax.inference.answer_files import write_answer
from tests.support.tiny_checkpoint import change_json, read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
COMMANDS = ("convert", "export", "segment")
QUESTION = "Please segment the dog."


def run_outside(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would, in another process and folder."""
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", *environment)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def refuse(tmp_path, capfd):
    """Run a command that must fail as bad input does; return its one line."""

    def refuse(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1 and err.endswith("\n"), err
        assert err.startswith(f"pixellm {arguments[0]}: ")
        assert "Traceback" not in err and "Error" not in err.split(":")[0]
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refuse


def segment_options(tiny, image: Path, out: Path) -> list[str]:
    options = {"checkpoint": tiny.jax, "image": image, "question": QUESTION, "out": out}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def convert_options(hf: Path, vision: Path, out: Path) -> list[str]:
    return ["--hf", str(hf), "--vision", str(vision), "--out", str(out)]


@pytest.fixture
def photo(data_root) -> Path:
    return sorted(data_root.glob("ade20k/images/training/*.jpg"))[0]


def noise(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# Results


def test_segment_writes_answer_masks_and_overlay(tiny, photo, tmp_path, capfd):
    out = tmp_path / "new folder" / "answer"
    assert main(["segment", *segment_options(tiny, photo, out)]) == 0
    printed, err = capfd.readouterr()
    assert err == ""
    lines = printed.splitlines()
    assert lines[0] == "It is [SEG]."
    assert re.fullmatch(r"  0: \(not named\), score 0\.\d\d, \d+ pixels", lines[1])
    assert lines[2:] == [str(out / "overlay.png")]

    assert sorted(path.name for path in out.iterdir()) == [
        "answer.json",
        "mask_00.png",
        "overlay.png",
    ]
    record = json.loads((out / "answer.json").read_text(encoding="utf-8"))
    with Image.open(photo) as image:
        size = [image.height, image.width]
    assert record["size"] == size
    assert record["image"] == str(photo)
    assert record["question"] == QUESTION
    assert record["text"] == "It is [SEG]."
    assert record["complete"] is True
    (target,) = record["targets"]
    begin, end = target["span"]
    assert record["text"][begin:end] == target["phrase"]
    begin, end = target["marker"]
    assert record["text"][begin:end] == "[SEG]"
    assert 0.5 < target["score"] <= 1 and 0.5 < target["presence"] <= 1
    assert target["kept"] is True and record["reason"] == "stop"

    with Image.open(out / target["mask"]) as image:
        mask = np.asarray(image)
    assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
    assert list(mask.shape) == target["segmentation"]["size"] == size
    np.testing.assert_array_equal(coco.decode(target["segmentation"]) * 255, mask)
    assert target["area"] == (mask > 0).sum() > 0
    rows, columns = np.nonzero(mask)
    x, y, width, height = target["box"]
    assert [x, y] == [columns.min(), rows.min()]
    assert [x + width, y + height] == [columns.max() + 1, rows.max() + 1]
    with Image.open(out / "overlay.png") as image:
        assert image.format == "PNG" and min(image.size) > 0


def made_answer(text: str, masks: np.ndarray, spans: list[tuple[int, int]]) -> Answer:
    count = len(masks)
    return Answer(
        text=text,
        masks=masks,
        scores=np.linspace(0.6, 0.9, count, dtype=np.float32),
        presence=np.linspace(0.5, 1, count, dtype=np.float32),
        kept=masks.any(axis=(1, 2)),
        spans=np.asarray(spans, np.int32).reshape(-1, 2),
        markers=np.zeros((count, 2), np.int32),
        finish_reason="stop",
        num_tokens=9,
        num_steps=9,
    )


def test_many_and_empty_masks_are_written(tmp_path):
    masks = np.zeros((12, 20, 30), bool)
    for i in range(11):
        masks[i, i : i + 3, 2 * i : 2 * i + 4] = True
    text = "The dög is [SEG]."
    answer = made_answer(text, masks, [(4, 7)] * 12)
    targets = write_answer(tmp_path, answer, noise(), Path("a.jpg"), "¿Qué?")
    record = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert record["targets"] == targets
    assert record["question"] == "¿Qué?"
    assert [target["mask"] for target in targets] == [f"mask_{i:02d}.png" for i in range(12)]
    assert targets[10]["box"] == [20, 10, 4, 3] and targets[10]["phrase"] == "dög"
    assert targets[11]["box"] is None and targets[11]["area"] == 0
    for target, mask in zip(targets, masks, strict=True):
        np.testing.assert_array_equal(coco.decode(target["segmentation"]), mask)


def test_answer_without_targets_is_written(tmp_path):
    answer = made_answer("Nothing.", np.zeros((0, 20, 30), bool), [])
    assert write_answer(tmp_path, answer, noise(), Path("a.jpg"), "What?") == []
    assert json.loads((tmp_path / "answer.json").read_text())["targets"] == []
    with Image.open(tmp_path / "overlay.png") as image:
        assert image.mode == "RGB"


def test_image_with_an_undecodable_name(tiny, tmp_path, capfd):
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.fromarray(noise()).save(os.fsencode(image), format="PNG")
    assert main(["segment", *segment_options(tiny, image, tmp_path / "answer")]) == 0
    capfd.readouterr()
    record = json.loads((tmp_path / "answer" / "answer.json").read_text(encoding="utf-8"))
    assert record["image"].endswith("caf?.png")


def test_segment_replaces_only_an_earlier_answer(tiny, tmp_path, capfd, refuse):
    image = tmp_path / "picture.png"
    Image.fromarray(noise()).save(image)
    out = tmp_path / "answer"
    out.mkdir()
    (out / "answer.json").write_text("an earlier one")
    (out / "mask_05.png").write_text("of it")
    assert main(["segment", *segment_options(tiny, image, out)]) == 0
    capfd.readouterr()
    assert not (out / "mask_05.png").exists()
    assert json.loads((out / "answer.json").read_text())["text"] == "It is [SEG]."

    (out / "notes.txt").write_text("mine")
    line = refuse("segment", *segment_options(tiny, image, out))
    assert f"{out}: there is already a folder that is not empty" in line
    assert (out / "notes.txt").read_text() == "mine"
    line = refuse("segment", *segment_options(tiny, image, tmp_path))
    assert f"{tmp_path}: there is already a folder" in line


def test_convert_and_export_print_their_result(tiny, tmp_path, capfd):
    options = convert_options(tiny.hf, tiny.clip, tmp_path / "jax")
    assert main(["convert", *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""  # no progress bar without a terminal
    assert out == (
        f"{tmp_path / 'jax'}: 2 layers of width 64, 428 ids, 3 codebook tokens at 2 scales, "
        "pictures of 112 pixels, float32, template llava_v1, position table released\n"
    )
    again = tmp_path / "again"
    assert main(["export", "--checkpoint", str(tmp_path / "jax"), "--hf", str(again)]) == 0
    assert capfd.readouterr() == (f"{again} and {again / 'vision_tower'}\n", "")
    assert sorted(os.listdir(tmp_path)) == ["again", "jax"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  pixellm {command} --" in text
    example = text[text.index("examples:") :]
    for option in re.findall(r"--[a-z-]+", example):
        assert option in text[: text.index("examples:")]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["draw"], ["segment"], ["convert", "--hf"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pixellm" in capsys.readouterr().err


def test_every_command_has_options_a_description_and_a_runner():
    for command in COMMAND_TABLE.values():
        module = import_module(command.module)
        parser = argparse.ArgumentParser()
        module.add_options(parser)
        assert parser.description and callable(module.run)


# Bad input


def no_image(folder: Path) -> Path:
    return folder / "no.jpg"


def truncated_image(folder: Path) -> Path:
    Image.fromarray(noise(200, 300)).save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    return folder / "cut.jpg"


def text_image(folder: Path) -> Path:
    (folder / "text.jpg").write_text("This is not a photo.\n")
    return folder / "text.jpg"


def elongated_image(folder: Path) -> Path:
    Image.fromarray(noise(1, 1000)).save(folder / "line.png")
    return folder / "line.png"


def empty_image(folder: Path) -> Path:
    (folder / "empty.jpg").write_bytes(b"")
    return folder / "empty.jpg"


def folder_image(folder: Path) -> Path:
    (folder / "photos").mkdir()
    return folder / "photos"


@pytest.mark.parametrize(
    ("make", "problem", "remedy"),
    [
        (no_image, "no such file", "check the path"),
        (truncated_image, "damaged", "fetch it again"),
        (text_image, "is not an image that Pillow knows", "convert it"),
        (elongated_image, "1 x 1000 pixels is too elongated", "crop the image"),
        (empty_image, "is an empty file", "download it again"),
        (folder_image, "contains no images", "name an image"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_image_is_one_line(tiny, tmp_path, refuse, make, problem, remedy):
    image = make(tmp_path)
    line = refuse("segment", *segment_options(tiny, image, tmp_path / "new" / "answer"))
    assert problem in line and remedy in line
    assert str(image) in line or make is elongated_image


def test_bad_image_keeps_the_earlier_answer(tiny, tmp_path, refuse):
    out = tmp_path / "answer"
    out.mkdir()
    (out / "answer.json").write_text("an earlier one")
    refuse("segment", *segment_options(tiny, elongated_image(tmp_path), out))
    assert (out / "answer.json").read_text() == "an earlier one"


def test_empty_question_is_one_line(tiny, tmp_path, refuse):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    options = segment_options(tiny, tmp_path / "a.png", tmp_path / "answer")
    assert "question is empty" in refuse("segment", *options, "--question", " ")


def shards(folder: Path) -> list[Path]:
    """Split the weights of a folder into three files with an index."""
    tensors = read_tensors(folder)
    names = sorted(tensors)
    files, index = [], {}
    for i in range(3):
        part = folder / f"part{i}"
        part.mkdir()
        write_tensors(part, {name: tensors[name] for name in names[i::3]})
        files.append(folder / f"model-{i + 1:05d}-of-00003.safetensors")
        index |= dict.fromkeys(names[i::3], files[-1].name)
    write_tensors(folder, tensors)
    (folder / "model.safetensors").unlink()
    for i, file in enumerate(files):
        (folder / f"part{i}" / "model.safetensors").rename(file)
        (folder / f"part{i}").rmdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return files


def edit_index(folder: Path, shard: str) -> None:
    """Point the index entry of one tensor to another file."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))


def zero_byte_weights(model: Path, clip: Path) -> list[str]:
    file = shards(model)[1]
    file.write_bytes(b"")
    return [str(file), "0 bytes"]


def cut_weights(model: Path, clip: Path) -> list[str]:
    file = shards(model)[1]
    file.write_bytes(file.read_bytes()[:-9])
    return [str(file)]


def missing_shard(model: Path, clip: Path) -> list[str]:
    file = shards(model)[1]
    file.unlink()
    return [str(model), file.name, "download the complete folder again"]


def missing_shard_without_index(model: Path, clip: Path) -> list[str]:
    named = missing_shard(model, clip)
    (model / "model.safetensors.index.json").unlink()
    return named


def absent_file_in_index(model: Path, clip: Path) -> list[str]:
    shards(model)
    edit_index(model, "model-00009-of-00003.safetensors")
    return ["model.safetensors.index.json", "model-00009-of-00003.safetensors"]


def path_out_of_the_folder(model: Path, clip: Path) -> list[str]:
    shards(model)
    shutil.copyfile(model / "model-00001-of-00003.safetensors", model.parent / "x.safetensors")
    edit_index(model, "../x.safetensors")
    return ["model.safetensors.index.json", "model.norm.weight", "'../x.safetensors'"]


def absolute_path_in_index(model: Path, clip: Path) -> list[str]:
    shards(model)
    edit_index(model, "/etc/passwd")
    return ["model.safetensors.index.json", "model.norm.weight", "'/etc/passwd'"]


def index_that_is_no_json(model: Path, clip: Path) -> list[str]:
    shards(model)
    (model / "model.safetensors.index.json").write_text("<html>not found</html>")
    return ["model.safetensors.index.json", "expected valid JSON"]


def missing_config(model: Path, clip: Path) -> list[str]:
    (model / "config.json").unlink()
    return [f"{model / 'config.json'}: no such file"]


def config_that_is_no_json(model: Path, clip: Path) -> list[str]:
    (model / "config.json").write_text("{'model_type': 'llava'}")
    return [f"{model / 'config.json'}: not readable as JSON"]


def unknown_model_type(model: Path, clip: Path) -> list[str]:
    change_json(model / "config.json", model_type="gpt2", pixellm_jax=None)
    return [f"{model / 'config.json'}: unknown model type 'gpt2'", "llava"]


def unknown_vision_type(model: Path, clip: Path) -> list[str]:
    change_json(clip / "config.json", model_type="dinov2")
    return [f"{clip / 'config.json'}: unknown model type 'dinov2'", "CLIP"]


def missing_vision_config(model: Path, clip: Path) -> list[str]:
    (clip / "config.json").unlink()
    return [f"{clip / 'config.json'}: no such file"]


def vision_without_weights(model: Path, clip: Path) -> list[str]:
    for file in clip.glob("model*"):
        file.unlink()
    return [str(clip), "no weights"]


def missing_tokenizer(model: Path, clip: Path) -> list[str]:
    (model / "tokenizer.model").unlink()
    return [str(model), "tokenizer.model"]


def damaged_tokenizer(model: Path, clip: Path) -> list[str]:
    (model / "tokenizer.model").write_bytes(b"nonsense")
    return [str(model), "tokenizer"]


def tokens_that_are_no_json(model: Path, clip: Path) -> list[str]:
    (model / "added_tokens.json").write_text("[SEG]")
    return [str(model / "added_tokens.json"), "JSON"]


class Payload:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


def evil_bin(model: Path, clip: Path) -> list[str]:
    for file in model.glob("model*"):
        file.unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        data = pickle.dumps({"model.norm.weight": Payload(model / "hacked")}, protocol=2)
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")
    return [str(model / "pytorch_model.bin"), "posix.system"]


@pytest.mark.parametrize(
    "spoil",
    [
        zero_byte_weights,
        cut_weights,
        missing_shard,
        missing_shard_without_index,
        absent_file_in_index,
        path_out_of_the_folder,
        absolute_path_in_index,
        index_that_is_no_json,
        missing_config,
        config_that_is_no_json,
        unknown_model_type,
        unknown_vision_type,
        missing_vision_config,
        vision_without_weights,
        missing_tokenizer,
        damaged_tokenizer,
        tokens_that_are_no_json,
        evil_bin,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_bad_source_is_one_line(copied, tmp_path, refuse, spoil):
    model, clip = copied("hf"), copied("clip")
    named = spoil(model, clip)
    line = refuse("convert", *convert_options(model, clip, tmp_path / "new" / "jax"))
    for part in named:
        assert part in line
    assert not (model / "hacked").exists()


def test_sharded_weights_without_damage_convert(copied, tiny, tmp_path):
    """Otherwise the refusals above would prove nothing."""
    model = copied("hf")
    assert len(shards(model)) == 3
    assert main(["convert", *convert_options(model, tiny.clip, tmp_path / "jax")]) == 0


def test_missing_folder_is_one_line(tiny, tmp_path, refuse):
    gone = tmp_path / "gone"
    for hf, vision in ((gone, tiny.clip), (tiny.hf, gone)):
        assert str(gone) in refuse("convert", *convert_options(hf, vision, tmp_path / "jax"))
    line = refuse("export", "--checkpoint", gone, "--hf", tmp_path / "again")
    assert f"{gone}: no such folder" in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["taken", "below a file", "name too long"])
def test_unwritable_output_is_one_line(tiny, tmp_path, refuse, command, place):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    out = {
        "taken": tmp_path / "taken",
        "below a file": tmp_path / "file" / "out",
        "name too long": tmp_path / ("x" * 300),
    }[place]
    options = {
        "convert": convert_options(tiny.hf, tiny.clip, out),
        "export": ["--checkpoint", str(tiny.jax), "--hf", str(out)],
        "segment": segment_options(tiny, tmp_path / "a.png", out),
    }[command]
    line = refuse(command, *options)
    assert str(out) in line
    assert "choose another" in line
    assert (tmp_path / "taken" / "file").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["segment", "export"])
def test_unreadable_checkpoint_is_one_line(tiny, copied, tmp_path, refuse, command):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    folder = copied("jax")
    for file in (folder / "params" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(b"")
    options = {
        "segment": segment_options(tiny._replace(jax=folder), tmp_path / "a.png", tmp_path / "out"),
        "export": ["--checkpoint", str(folder), "--hf", str(tmp_path / "out")],
    }[command]
    line = refuse(command, *options)
    assert str(folder / "params") in line
    assert "not a complete Orbax checkpoint" in line and "convert" in line


def test_pytorch_folder_as_checkpoint_suggests_convert(tiny, tmp_path, refuse):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    wrong = tiny._replace(jax=tiny.hf)
    line = refuse("segment", *segment_options(wrong, tmp_path / "a.png", tmp_path / "out"))
    assert f"pixellm convert --hf {tiny.hf}" in line


def test_nan_weights_pass_unchanged(copied, tiny, tmp_path):
    """Weights are copied bit for bit, without a check for NaN or infinity."""
    model = copied("hf")
    tensors = read_tensors(model)
    tensors["lm_head.weight"][0] = np.nan
    write_tensors(model, tensors)
    assert main(["convert", *convert_options(model, tiny.clip, tmp_path / "jax")]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "jax"), "--hf", str(tmp_path / "b")]) == 0
    assert np.isnan(read_tensors(tmp_path / "b")["lm_head.weight"][0]).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_killed_command_leaves_nothing(tiny, tmp_path, capfd, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)

    @contextlib.contextmanager
    def deadly_bar(what):
        def advance(new: int, total: int) -> None:
            if new:
                assert any(tmp_path.glob(".jax.*/*"))
                os.kill(os.getpid(), number)

        yield advance

    monkeypatch.setattr(convert_command, "byte_bar", deadly_bar)
    assert main(["convert", *convert_options(tiny.hf, tiny.clip, tmp_path / "jax")]) == 130
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().err == "pixellm convert: interrupted; nothing was left behind\n"
    assert signal.getsignal(signal.SIGTERM) == before


def assert_one_line(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


def test_entry_points_refuse_alike(tmp_path):
    options = ["--checkpoint", "gone", "--image", "no.jpg", "--question", "?", "--out", "answer"]
    package = run_outside("-m", "pixellm_jax", "segment", *options, folder=tmp_path)
    module = run_outside("-m", "pixellm_jax.cli.main", "segment", *options, folder=tmp_path)
    for done in (package, module):
        assert_one_line(done)
    assert package.stderr == module.stderr
    assert "no such file 'no.jpg'" in package.stderr
    assert os.listdir(tmp_path) == []


def test_train_script_is_the_train_command(tmp_path):
    options = ["--config", "no.py", "--out", "run"]
    script = run_outside(ROOT / "scripts" / "train.py", *options, folder=tmp_path)
    package = run_outside("-m", "pixellm_jax", "train", *options, folder=tmp_path)
    for done in (script, package):
        assert_one_line(done)
    assert script.stderr == package.stderr
    assert "no.py: no such recipe" in script.stderr


def test_damaged_checkpoint_is_one_line_from_outside(copied, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    folder = copied("jax")
    for file in (folder / "params" / "d").iterdir():
        file.write_bytes(b"")
    options = ["--checkpoint", folder, "--image", "a.png", "--question", "?", "--out", "answer"]
    done = run_outside("-m", "pixellm_jax", "segment", *options, folder=tmp_path)
    assert_one_line(done)
    assert str(folder / "params") in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.png", "jax copy"]


def test_evil_weights_are_one_line_from_outside(copied, tiny, tmp_path):
    model = copied("hf")
    evil_bin(model, tiny.clip)
    options = convert_options(model, tiny.clip, Path("jax"))
    done = run_outside("-m", "pixellm_jax", "convert", *options, folder=tmp_path)
    assert_one_line(done)
    assert not (model / "hacked").exists()
    assert os.listdir(tmp_path) == ["hf copy"]
