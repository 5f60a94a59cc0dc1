"""Entries of a split -> ArrayRecord shards, in parallel, and so that an interruption loses little.

A split is cut into runs of consecutive entries, and each run becomes one shard. Its bytes depend on
the entries alone, so they are the same whoever writes it: this process, a pool of processes, or the
workers of an Apache Beam pipeline. Shards are written into a working folder. A shard is finished
when its report stands beside it; the report is written last, and a file appears whole or not at
all. What an interruption left unfinished is written again, what is finished is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipeline.errors import DamagedError
from data_pipeline.reading import Source
from data_pipeline.storage.stored import VERSION, to_record
from pixellm_jax import __version__
from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_file
from pixellm_jax.images.read import read_image

RUN, MOST_RUNS = 256, 4096
"""Entries of a shard, unless that makes more than `MOST_RUNS` shards."""

_RECORDS = "group_size:1"  # each record can be read on its own
_BEAM_MISSING = "apache-beam is not installed: pip install 'pixellm_jax[beam]'"


class Skip(NamedTuple):
    """Something that was left out: a whole entry, or a part of the example `key`."""

    key: str
    whole: bool
    reason: str


class Report(NamedTuple):
    """Outcome of a run of entries; `targets` and `turns` count the stored examples only."""

    entries: int
    examples: int
    turns: int
    targets: int
    skips: tuple[Skip, ...]


class Plan(NamedTuple):
    """Partition of a split into shards: `run` entries each, written into `folder`."""

    source: Source
    root: Path
    split: str
    folder: Path
    run: int

    @property
    def name(self) -> str:
        return f"{self.source.dataset}/{self.split}"

    def shard(self, number: int) -> Path:
        return self.folder / f"{number:06d}.array_record"

    def report(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def run_length(entries: int) -> int:
    """Entries per shard: a function of their number only."""
    return max(RUN, math.ceil(entries / MOST_RUNS))


def write_shards(
    plan: Plan,
    entries: Sequence[Any],
    *,
    workers: int = 1,
    runner: str | None = None,
    runner_options: Sequence[str] = (),
) -> Iterator[Report]:
    """Writes the shards that are not finished; yields the report of every shard in order.

    `runner`: an Apache Beam runner that does it instead of a pool of `workers` processes;
    `runner_options` are Beam's own, as `--name=value`.

    Raises:
        InputError: a worker was killed, or Beam is not installed. (Its own failures are its own.)
    """
    shards = math.ceil(len(entries) / plan.run)
    todo = [number for number in range(shards) if not _finished(plan, number)]
    if runner and todo:
        _write_with_beam(plan, todo, runner, runner_options)
        todo = []
    writing = set(todo)
    jobs = [(number, _own(plan, number, entries)) for number in todo]
    with _mapped(min(workers, len(todo)), partial(_write_run, plan)) as mapped:
        written = mapped(jobs)
        for number in range(shards):
            yield next(written) if number in writing else read_report(plan, number)


def read_report(plan: Plan, number: int) -> Report:
    """The report of a finished shard."""
    record = json.loads(plan.report(number).read_text(encoding="ascii"))
    return Report(**{**record, "skips": tuple(Skip(*skip) for skip in record["skips"])})


@contextlib.contextmanager
def working_folder(plan: Plan, entries: Sequence[Any]) -> Iterator[None]:
    """Opens the folder of a plan for one process alone; keeps what fits the plan, and no other.

    Raises:
        InputError: another process is at work in it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with (plan.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{plan.folder}: another process prepares {plan.name}; let it finish or end it"
            ) from None
        wanted, made_for = _fingerprint(plan, entries), plan.folder / "made_for"
        fits = made_for.is_file() and made_for.read_text(encoding="ascii") == wanted
        for path in plan.folder.iterdir():
            if path.name.startswith(".") or (not fits and path.name != "lock"):
                path.unlink()
        made_for.write_text(wanted, encoding="ascii")
        yield


def _fingerprint(plan: Plan, entries: Sequence[Any]) -> str:
    """Return a digest of everything that determines the shards, except the images themselves."""
    digest = hashlib.sha256(repr((VERSION, __version__, plan._replace(folder=Path()))).encode())
    for entry in entries:
        digest.update(repr(entry).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _finished(plan: Plan, number: int) -> bool:
    return plan.report(number).is_file() and plan.shard(number).is_file()


def _own(plan: Plan, number: int, entries: Sequence[Any]) -> Sequence[Any]:
    return entries[number * plan.run : (number + 1) * plan.run]


def _write_run(plan: Plan, job: tuple[int, Sequence[Any]]) -> Report:
    """Writes one shard, then its report."""
    number, entries = job
    skips, examples = list[Skip](), list[tuple[int, int]]()
    with whole_file(plan.shard(number)) as path, _record_writer(path) as write:
        for entry in entries:
            try:
                example, problems = plan.source.read(entry)
                _decode(example.image)
            except DamagedError as reason:
                skips.append(Skip(entry.key, True, " ".join(str(reason).split())))
                continue
            skips += (Skip(example.key, False, " ".join(p.split())) for p in problems)
            examples.append((sum(map(len, example.conversations)), len(example.targets)))
            write(to_record(example))
    turns, targets = map(sum, zip(*examples, strict=True)) if examples else (0, 0)
    report = Report(len(entries), len(examples), turns, targets, tuple(skips))
    with whole_file(plan.report(number)) as path:
        path.write_text(json.dumps(report._asdict()), encoding="ascii")
    return report


def _decode(image: bytes) -> None:
    """Decodes the image once: the readers look at its header only."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            read_image(opened, upright=False)
    except InputError as error:
        raise DamagedError(f"the picture is damaged ({error})") from None


@contextlib.contextmanager
def _record_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Writes records; a full disk is an OSError, as everywhere else."""
    writer = ArrayRecordWriter(str(path), _RECORDS)

    def write(record: bytes) -> None:
        with _as_os_error():
            writer.write(record)

    yield write
    with _as_os_error():
        writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


@contextlib.contextmanager
def _mapped(workers: int, function: Callable[[Any], Report]) -> Iterator[Callable]:
    """An ordered `map`: over a pool of processes, or over this one alone."""
    if workers <= 1:
        yield partial(map, function)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_watch_parent)

    def mapped(jobs: Sequence[Any]) -> Iterator[Report]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # left to the parent
        try:
            return pool.map(function, jobs)  # starts the processes, which inherit the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield mapped
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for its memory: run the command again to go on, "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _watch_parent() -> None:
    """Ends this worker when its parent ends, however that may be."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _write_with_beam(
    plan: Plan, numbers: Sequence[int], runner: str, options: Sequence[str]
) -> None:
    """Writes shards on Beam's workers, which see the source and the working folder as we do."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise InputError(_BEAM_MISSING) from None
    with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | beam.Create(numbers) | beam.Reshuffle()
        _ = shards | "Write" >> beam.Map(partial(_write_listed, plan))


def _write_listed(plan: Plan, number: int) -> None:
    entries = _listed(plan.source, plan.root, plan.split)  # type: ignore[arg-type]
    _write_run(plan, (number, _own(plan, number, entries)))


@lru_cache(maxsize=1)
def _listed(source: Source, root: Path, split: str) -> Sequence[Any]:
    """The index of a split: each of Beam's workers reads it once, no shard is sent its entries."""
    return source.entries(root, split)
