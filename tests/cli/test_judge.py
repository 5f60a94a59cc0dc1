"""`pixellm judge` on a folder, with a real server and offline."""

from __future__ import annotations

import json

import pytest

from pixellm_jax.cli.main import main
from pixellm_jax.evaluation.judge.client import KEY
from tests.support.judging import Bad, Server, record, serve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY", KEY):
        monkeypatch.delenv(name, raising=False)
    lines = [record(n).to_json() + "\n" for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    settings = {"benchmark": "muse", "split": "val", "mode": "generated"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def test_server(folder, capsys):
    bad = {3: Bad(400, b'{"error": {"message": "not this one"}}')}
    with serve(Server(lambda number, before: bad.get(number))) as server:
        command = ["judge", "--report", str(folder), "--judge-url", server.url]
        command += ["--judge-model", "m", "--judge-price", "2", "8"]
        assert main(command) == 2
        said = capsys.readouterr()
        assert "1 of 5 questions have no score" in said.err and "not this one" in said.err
        assert "run the same command again" in said.err
        bad.clear()
        assert main(command) == 0
        assert sum(server.requests_by_question.values()) == 6
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:4] == ["questions", "of", "questions", "masks"]
    # Scores, first of the whole mask, then of the half one: 2 3, 5 6, 8 9, 1 2, 4 5.
    row = ["all", "5", "10", "0.7500", f"{65 / 78:.4f}", "0.4500", "0.5000", "4.5000", "0.4000"]
    assert said[1].split() == row
    stored = json.loads((folder / "judge.json").read_text())
    assert f"judge: {stored['judge']}; targets below 4" in "\n".join(said)
    assert said[-2] == "cost: 0.0003 now, 0.0014 for all scores"
    assert stored["judge"] in (folder / "report.md").read_text()


def test_offline(folder, capsys):
    assert main(["judge", "--report", str(folder), "--judge-offline", "--threshold", "2"]) == 0
    said = capsys.readouterr().out
    # The table is named rightly (10), the plant is a cup (1): the half mask is lost.
    row = ["all", "5", "10", "0.7500", f"{65 / 78:.4f}", "0.5000", f"{52 / 78:.4f}"]
    assert said.splitlines()[1].split() == [*row, "5.5000", "0.5000"]
    assert "judge: shared words (offline, comparable with no other judge)" in said
    assert json.loads((folder / "judge.json").read_text())["threshold"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no judge: give"),
        (["--judge-model", "m"], "no judge: give"),
        (["--judge-offline", "--judge-model", "m"], "uses no server"),
        (["--judge-offline", "--threshold", "0"], "threshold 0"),
        (["--judge-url", "host", "--judge-model", "m"], "URL"),
        (["--judge-url", "http://h", "--judge-model", "m", "--judge-workers", "0"], "one worker"),
        (["--judge-url", "http://h", "--judge-model", "m", "--judge-temperature", "x"], "`own`"),
    ],
)
def test_wrong_options(folder, capsys, options, message):
    assert main(["judge", "--report", str(folder), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "judge.json").exists()
