"""Output folder of an evaluation: its settings, and one line per question, written as it is scored.

settings.json    checkpoint, benchmark and mode; an evaluation with other settings is refused
questions.jsonl  one `QuestionRecord` per line; questions-<host>.jsonl while several hosts write
released.jsonl   with `reference_compat`: one `ReleasedLine` per question
run.json         time spent, images left out, the scores of the released code

An interrupted evaluation resumes: questions with a complete line are not answered again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixellm_jax import __version__
from pixellm_jax.benchmark_question import GENERATED
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import (
    QUESTIONS,
    SETTINGS,
    QuestionRecord,
    natural_order,
    read_records,
)
from pixellm_jax.evaluation.scoring import ReleasedLine, released_scores
from pixellm_jax.files import read_json, read_optional_json, write_whole
from pixellm_jax.weights import checkpoint

RUN = "run.json"
RELEASED = "released"
_OWN_FILES = (SETTINGS, f"{QUESTIONS}-", f"{RELEASED}-", "run-", f".{SETTINGS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Contents of `settings.json`: what an evaluation must have in common to be resumed."""

    benchmark: str
    """Name of the benchmark."""
    split: str
    """Split of the benchmark."""
    mode: str = GENERATED
    """`GENERATED` (free-running) or `GIVEN` (teacher-forced)."""
    data: str = ""
    """Name of the folder of datasets; "" if there is none."""
    checkpoint: str = ""
    """Name of the checkpoint's folder."""
    checkpoint_hash: str = ""
    """Hash of the checkpoint (`describe_model`)."""
    dtype: str = ""
    """Compute dtype."""
    weights: str | None = None
    """Quantization of the language model's weights; None for none."""
    limit: int | None = None
    """Number of images, from the first; None for all."""
    max_new_tokens: int | None = None
    """Token budget of a generated answer; None in mode `GIVEN`."""
    reference_compat: bool = False
    """Also compute the scores of the released code."""
    version: str = __version__
    """Version of this package."""


def describe_model(folder: Path, dtype: str | None, weights: str | None) -> dict[str, Any]:
    """Return the settings that identify a checkpoint and its arithmetic.

    Raises:
        InputError: the folder is not a checkpoint.
    """
    config = checkpoint.read_config(folder)
    return {
        "checkpoint": folder.resolve().name,
        "checkpoint_hash": _hash(folder),
        "dtype": dtype or config.dtype,
        "weights": weights,
    }


def check_settings(path: Path, settings: Mapping[str, Any], *, made: str) -> bool:
    """Compare settings with those in a file.

    Args:
        path: the file.
        settings: the expected contents.
        made: contents of the folder for the error message, such as "an evaluation".

    Returns:
        Whether the file exists.

    Raises:
        InputError: the file has other settings.
    """
    stored = read_optional_json(path)
    for key in stored.keys() | settings.keys() if stored else ():
        if stored.get(key) != settings.get(key):
            raise InputError(
                f"{path.parent}: {made} with {key} {stored.get(key)!r}, now "
                f"{settings.get(key)!r}; choose another --out"
            )
    return bool(stored)


class RunFolder:
    """One host's view of the output folder.

        folder = RunFolder(Path("report"), RunSettings(benchmark="muse", split="val"))
        folder.write(record)
        folder.close(seconds, questions=1, left_out={})
        records = folder.merge()

    Attributes:
        out: the folder.
        settings: the settings of the evaluation.
        host, hosts: index of this process and number of processes.
        completed: ids of the questions that earlier runs on all hosts have scored.
    """

    def __init__(self, out: Path, settings: RunSettings, *, host: int = 0, hosts: int = 1) -> None:
        """Open or create the folder.

        Raises:
            InputError: it holds anything else, or cannot be written.
        """
        self.out = out
        self.settings = settings
        self.host = host
        self.hosts = hosts
        self._suffix = "" if hosts == 1 else f"-{host}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._check_or_write_settings()
            self.completed = {record.id for record in _read_all_records(out)}
            self._questions = _open_lines(out / f"{QUESTIONS}{self._suffix}.jsonl")
            self._released = None
            if settings.reference_compat:
                self._released = _open_lines(out / f"{RELEASED}{self._suffix}.jsonl")
        except OSError as error:
            raise InputError(
                f"{out}: cannot write here ({error.strerror or error}); choose another --out"
            ) from None

    def write(self, record: QuestionRecord, released: ReleasedLine | None = None) -> None:
        """Append the record of a question and flush it to the operating system.

        Raises:
            InputError: writing failed, for example because the disk is full.
        """
        try:
            # The released line comes first, so that no record lacks its line.
            if self._released is not None and released is not None:
                _append_line(self._released, json.dumps(released._asdict()))
            _append_line(self._questions, record.to_json())
        except OSError as error:
            raise InputError(
                f"{self.out}: writing failed ({error.strerror or error}); free some space, then "
                "run the same command again to resume"
            ) from error

    def close(
        self, seconds: Mapping[str, float], questions: int, left_out: Mapping[str, str]
    ) -> None:
        """Close the files and add the statistics of this run to `run.json`.

        Args:
            seconds: time spent by activity.
            questions: number of questions scored by this run.
            left_out: id of an image -> reason why it, or a part of it, was left out.
        """
        for file in (self._questions, self._released):
            if file is not None:
                file.close()
        path = self.out / f"run{self._suffix}.json"
        run = {
            "questions": questions,
            "seconds": dict(seconds) if questions else {},
            "left_out": dict(left_out),
        }
        _write_json(path, _add_runs([read_optional_json(path), run]))

    def merge(self) -> list[QuestionRecord]:
        """Merge the files of all hosts into one, sorted by id, and return its records.

        Only one host may call this, after all hosts have closed their folders.
        """
        records = _read_all_records(self.out)
        lines = [f"{record.to_json()}\n" for record in records]
        _replace(self.out / f"{QUESTIONS}.jsonl", "".join(lines))
        run = _add_runs([read_json(path) for path in sorted(self.out.glob("run*.json"))])
        if self.settings.reference_compat:
            run["released"] = self._merge_released(records)
        _write_json(self.out / RUN, run)
        for pattern in (f"{QUESTIONS}-*.jsonl", f"{RELEASED}-*.jsonl", "run-*.json"):
            for path in self.out.glob(pattern):
                path.unlink()
        return records

    def _merge_released(self, records: Sequence[QuestionRecord]) -> dict[str, float]:
        lines = _read_all_released(self.out)
        missing = [record.id for record in records if record.id not in lines]
        if missing:
            raise InputError(
                f"{self.out}: {RELEASED}.jsonl lacks {len(missing)} questions, such as "
                f"{missing[0]!r}; start again with another --out"
            )
        ordered = [lines[record.id] for record in records]
        _replace(
            self.out / f"{RELEASED}.jsonl",
            "".join(f"{json.dumps(line._asdict())}\n" for line in ordered),
        )
        return released_scores(ordered)

    def _check_or_write_settings(self) -> None:
        path = self.out / SETTINGS
        settings = dataclasses.asdict(self.settings)
        if check_settings(path, settings, made="an evaluation"):
            return
        if not all(path.name.startswith(_OWN_FILES) for path in self.out.iterdir()):
            raise InputError(f"{self.out}: holds something else; choose another --out")
        if self.host == 0:
            _write_json(path, settings)


def _hash(folder: Path) -> str:
    """Hash the config, and the names and sizes of all files of a checkpoint."""
    digest = hashlib.sha256((folder / checkpoint.CONFIG).read_bytes())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _read_all_records(out: Path) -> list[QuestionRecord]:
    """Read the records of all hosts, each once, sorted by id."""
    records: dict[str, QuestionRecord] = {}
    for path in _host_files(out, QUESTIONS):
        for record in read_records(path):
            records.setdefault(record.id, record)
    return sorted(records.values(), key=natural_order)


def _read_all_released(out: Path) -> dict[str, ReleasedLine]:
    lines: dict[str, ReleasedLine] = {}
    for path in _host_files(out, RELEASED):
        for text in path.read_bytes().splitlines(keepends=True):
            if not text.endswith(b"\n"):
                break
            try:
                line = ReleasedLine(**json.loads(text))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}: damaged ({error}); choose another --out") from None
            lines[line.id] = line
    return lines


def _host_files(out: Path, name: str) -> list[Path]:
    merged = out / f"{name}.jsonl"
    return [merged] * merged.exists() + sorted(out.glob(f"{name}-*.jsonl"))


def _open_lines(path: Path) -> io.BufferedWriter:
    """Open a file of lines to append to; an incomplete last line is cut off."""
    data = path.read_bytes() if path.exists() else b""
    file = path.open("ab")
    file.truncate(data.rfind(b"\n") + 1)
    return file


def _append_line(file: io.BufferedWriter, line: str) -> None:
    file.write(f"{line}\n".encode("utf-8", errors="replace"))
    file.flush()


def _add_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the statistics of runs and hosts."""
    questions = 0
    seconds = Counter[str]()
    left_out: dict[str, str] = {}
    for run in runs:
        questions += run.get("questions", 0)
        for name, value in run.get("seconds", {}).items():
            seconds[name] += value
        left_out |= run.get("left_out", {})
    return {
        "questions": questions,
        "seconds": dict(seconds),
        "left_out": left_out,
        "released": None,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _replace(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(
            f"{path}: writing failed ({error.strerror or error}); free some space, then run the "
            "same command again to resume"
        ) from None
