"""`pixellm report`: the command and its refusals."""

from __future__ import annotations

import pytest

from pixellm_jax.cli.main import main
from tests.support.made_up_run import random_questions, write_run


@pytest.fixture
def records():
    return random_questions(37, seed=1)


def test_command_writes_the_report_again(tmp_path, capsys, records):
    assert main(["report", str(write_run(tmp_path, records))]) == 0
    assert "| all | generated | none | 37 |" in capsys.readouterr().out
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", None, "no such file"),
        ("settings.json", '{"benchmark": "muse"}', "'split' is missing"),
        ("questions.jsonl", "", "no question in it"),
        ("questions.jsonl", "{}\n", "questions.jsonl:1"),
    ],
)
def test_damaged_runs_are_refused(tmp_path, capsys, name, content, message):
    write_run(tmp_path, random_questions(2, seed=0))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_unknown_data_folder_is_refused(tmp_path, capsys, records):
    write_run(tmp_path, records)
    assert main(["report", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
