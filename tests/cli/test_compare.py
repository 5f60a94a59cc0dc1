"""`pixellm compare`: refusals."""

from __future__ import annotations

import pytest

from pixellm_jax.cli.main import main
from tests.support.made_up_run import random_questions, write_run


@pytest.mark.parametrize("change", [{"benchmark": "refcoco"}, {"split": "test_many"}])
def test_other_benchmarks_are_refused(tmp_path, capsys, change):
    records = random_questions(3, 1)
    write_run(tmp_path / "a", records)
    write_run(tmp_path / "b", records, **change)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "same benchmark and split" in capsys.readouterr().err


def test_missing_folder_is_refused(tmp_path, capsys):
    write_run(tmp_path / "a", random_questions(2, 1))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err
