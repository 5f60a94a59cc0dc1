"""Output folders: whole or not there, and never in the place of something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_file, whole_folder, write_whole

RESULTS = ("answer.json", "mask_*.png")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its text, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def fill(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)
    return folder


def test_folder_appears_only_when_the_block_ends(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as made:
        (made / "part").write_text("1")
        assert not out.exists()
        assert made.parent == tmp_path  # renaming inside one file system is atomic
    assert tree(tmp_path) == {"out": "folder", "out/part": "1"}
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out") as made:
        (made / "part").write_text("1")
        raise error
    assert tree(tmp_path) == {}


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"out: writing failed \(No space left on device\)"):
        with whole_folder(tmp_path / "new" / "out") as made:
            (made / "part").write_text("1")
            raise OSError(28, "No space left on device")
    assert tree(tmp_path) == {}


def test_missing_parents_are_made_and_go_again_on_failure(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert tree(tmp_path) == {}
    with whole_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert tree(tmp_path) == {"a": "folder", "a/b": "folder", "a/b/out": "folder"}


def test_parents_that_were_there_or_got_company_stay(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "old" / "new" / "out"):
        (tmp_path / "old" / "new" / "other").write_text("of another program")
        raise RuntimeError
    assert tree(tmp_path / "old") == {"new": "folder", "new/other": "of another program"}


def test_empty_folder_is_filled(tmp_path):
    out = fill(tmp_path / "out")
    with whole_folder(out) as made:
        (made / "part").write_text("1")
    assert tree(tmp_path) == {"out": "folder", "out/part": "1"}


@pytest.mark.parametrize("replaces", [(), RESULTS])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_anything_else_in_the_place_is_refused_and_kept(tmp_path, kind, replaces):
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else fill(out, mine_txt="mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=rf"{out}: there is already a {kind}"):
        with whole_folder(out, replaces=replaces):
            pytest.fail("the block ran")
    assert tree(tmp_path) == before


def test_earlier_result_is_replaced_with_all_its_files(tmp_path):
    out = fill(tmp_path / "out", answer_json="old")
    (out / "mask_07.png").write_text("old")
    with whole_folder(out, replaces=RESULTS) as made:
        (made / "answer.json").write_text("new")
        assert tree(out) == {"answer.json": "old", "mask_07.png": "old"}
    assert tree(tmp_path) == {"out": "folder", "out/answer.json": "new"}


def test_earlier_result_survives_a_failure(tmp_path):
    out = fill(tmp_path / "out", answer_json="old")
    with pytest.raises(RuntimeError), whole_folder(out, replaces=RESULTS):
        raise RuntimeError
    assert tree(tmp_path) == {"out": "folder", "out/answer.json": "old"}


def test_earlier_result_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", answer_json="old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == out and not str(source).endswith(".old"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        with whole_folder(out, replaces=RESULTS) as made:
            (made / "answer.json").write_text("new")
    assert tree(tmp_path) == {"out": "folder", "out/answer.json": "old"}


@pytest.mark.parametrize(
    "files",
    [{"answer_json": "r", "notes_txt": "mine"}, {"mask_1.png": "r"}],
    ids=["a result and a file of the user", "not the file that marks a result"],
)
def test_folder_that_is_not_wholly_a_result_is_kept(tmp_path, files):
    out = fill(tmp_path / "out", **files)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="folder that is not empty"):
        with whole_folder(out, replaces=RESULTS):
            pytest.fail("the block ran")
    assert tree(tmp_path) == before


def test_what_appears_in_the_meantime_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="writing failed"), whole_folder(out) as made:
        (made / "part").write_text("1")
        fill(out, mine_txt="mine")
    assert tree(tmp_path) == {"out": "folder", "out/mine.txt": "mine"}


def test_link_to_an_earlier_result_stays_a_link(tmp_path):
    fill(tmp_path / "real", answer_json="old")
    (tmp_path / "out").symlink_to("real")
    with whole_folder(tmp_path / "out", replaces=RESULTS) as made:
        (made / "answer.json").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "real") == {"answer.json": "new"}


@pytest.mark.parametrize(
    "case", ["a file as parent", "a name too long", "a loop of links", "/proc"]
)
def test_place_that_cannot_be_written_is_one_line(tmp_path, case):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    out = {
        "a file as parent": tmp_path / "file" / "sub" / "out",
        "a name too long": tmp_path / "new" / ("x" * 300),
        "a loop of links": tmp_path / "loop" / "out",
        "/proc": Path("/proc/out"),
    }[case]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="cannot write here") as caught, whole_folder(out):
        pytest.fail("the block ran")
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_name_with_a_zero_byte():
    with pytest.raises(InputError, match="cannot write here"), whole_folder(Path("a\0b")):
        pass


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, "old\n")
    with pytest.raises(KeyError), whole_file(path) as made:
        made.write_text("half of the n")
        assert path.read_text() == "old\n"
        raise KeyError
    assert path.read_text() == "old\n"
    write_whole(path, "new \ud83d\n")
    assert path.read_bytes() == b"new ?\n"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "report.json", "")
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "report.json", "")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def umask() -> int:
    own = os.umask(0)
    os.umask(own)
    return own
