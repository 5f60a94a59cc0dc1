"""The folder of an evaluation: settings, and a line for every question as it is scored.

settings.json    what was asked of whom; another evaluation never goes on in the folder
questions.jsonl  one `QuestionRecord` per line; questions-<host>.jsonl while several hosts write
released.jsonl   with --reference-compat: one `ReleasedLine` per question
run.json         where the time went, what was left out, the released code's scores
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.record import (
    QUESTIONS,
    SETTINGS,
    QuestionRecord,
    natural_order,
    read_records,
)
from pixellm_jax.evaluation.scoring import ReleasedLine, released_scores
from pixellm_jax.evaluation.settings import check_settings
from pixellm_jax.files import read_json, read_optional_json, write_whole

RUN, RELEASED = "run.json", "released"
_OURS = (SETTINGS, f"{QUESTIONS}-", f"{RELEASED}-", "run-", f".{SETTINGS}")


class QuestionLog:
    """One host's share of the folder. `done`: ids of all hosts' earlier runs."""

    def __init__(
        self, out: Path, settings: Mapping[str, Any], *, host: int = 0, hosts: int = 1
    ) -> None:
        """Opens or makes the folder.

        Raises:
            InputError: it holds something else, or cannot be written.
        """
        self.out, self.settings, self._host = out, dict(settings), host
        self._ending = "" if hosts == 1 else f"-{host}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._settle()
            self.done = {record.id for record in _all_records(out)}
            self._questions = _append(out / f"{QUESTIONS}{self._ending}.jsonl")
            self._released = None
            if settings["reference_compat"]:
                self._released = _append(out / f"{RELEASED}{self._ending}.jsonl")
        except OSError as error:
            raise InputError(
                f"{out}: cannot write here ({error.strerror or error}); choose another --out"
            ) from None

    def write(self, record: QuestionRecord, released: ReleasedLine | None = None) -> None:
        """Adds a question; it has left this process when this returns.

        Raises:
            InputError: the disk is full.
        """
        try:
            if self._released is not None and released is not None:  # first, to be never missing
                _put(self._released, json.dumps(released._asdict()))
            _put(self._questions, record.to_json())
        except OSError as error:
            raise InputError(
                f"{self.out}: writing failed ({error.strerror or error}); free some space, then "
                "the same command goes on"
            ) from error

    def close(
        self, seconds: Mapping[str, float], questions: int, left_out: Mapping[str, str]
    ) -> None:
        """Ends the files, and adds what a run took to that of the runs before it."""
        for file in (self._questions, self._released):
            if file is not None:
                file.close()
        path = self.out / f"run{self._ending}.json"
        spent = dict(seconds) if questions else {}
        own = {"questions": questions, "seconds": spent, "left_out": dict(left_out)}
        _write(path, _add([read_optional_json(path), own]))

    def merge(self) -> list[QuestionRecord]:
        """Makes one file of those of all hosts, in the order of the ids; returns its records.

        To be called by one host, when all have closed their logs.
        """
        records = _all_records(self.out)
        lines = [f"{record.to_json()}\n" for record in records]
        _replace(self.out / f"{QUESTIONS}.jsonl", "".join(lines))
        run = _add([read_json(path) for path in sorted(self.out.glob("run*.json"))])
        if self.settings["reference_compat"]:
            found = _all_released(self.out)
            missing = [record.id for record in records if record.id not in found]
            if missing:
                raise InputError(
                    f"{self.out}: {RELEASED}.jsonl lacks {len(missing)} questions, such as "
                    f"{missing[0]!r}; start again with another --out"
                )
            own = [found[record.id] for record in records]
            _replace(
                self.out / f"{RELEASED}.jsonl",
                "".join(f"{json.dumps(line._asdict())}\n" for line in own),
            )
            run["released"] = released_scores(own)
        _write(self.out / RUN, run)
        for name in (f"{QUESTIONS}-*.jsonl", f"{RELEASED}-*.jsonl", "run-*.json"):
            for path in self.out.glob(name):
                path.unlink()
        return records

    def _settle(self) -> None:
        """Checks or writes the settings."""
        path = self.out / SETTINGS
        if check_settings(path, self.settings, made="an evaluation"):
            return
        if not all(path.name.startswith(_OURS) for path in self.out.iterdir()):
            raise InputError(f"{self.out}: holds something else; choose another --out")
        if self._host == 0:
            _write(path, self.settings)


def _all_records(out: Path) -> list[QuestionRecord]:
    """The records of all hosts, each once, in the order of their ids."""
    found: dict[str, QuestionRecord] = {}
    for path in _files(out, QUESTIONS):
        for record in read_records(path):
            found.setdefault(record.id, record)
    return sorted(found.values(), key=natural_order)


def _all_released(out: Path) -> dict[str, ReleasedLine]:
    found: dict[str, ReleasedLine] = {}
    for path in _files(out, RELEASED):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                own = ReleasedLine(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}: damaged ({error}); choose another --out") from None
            found[own.id] = own
    return found


def _files(out: Path, name: str) -> list[Path]:
    return [path for path in (out / f"{name}.jsonl",) if path.exists()] + sorted(
        out.glob(f"{name}-*.jsonl")
    )


def _append(path: Path) -> io.BufferedWriter:
    """Opens a file of lines; a last one that was cut off goes away."""
    data = path.read_bytes() if path.exists() else b""
    file = path.open("ab")
    file.truncate(data.rfind(b"\n") + 1)
    return file


def _put(file: io.BufferedWriter, line: str) -> None:
    file.write(f"{line}\n".encode("utf-8", errors="replace"))
    file.flush()


def _add(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs and hosts together: sums of questions and seconds, everything that was left out."""
    seconds, left_out = Counter[str](), dict[str, str]()
    for run in runs:
        for name, value in run.get("seconds", {}).items():
            seconds[name] += value
        left_out |= run.get("left_out", {})
    questions = sum(run.get("questions", 0) for run in runs)
    return {
        "questions": questions,
        "seconds": dict(seconds),
        "left_out": left_out,
        "released": None,
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    _replace(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(
            f"{path}: writing failed ({error.strerror or error}); free some space, then the same "
            "command goes on"
        ) from None
