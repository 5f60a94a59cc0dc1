"""Parallel, resumable writer of the entries of a split as ArrayRecord shards.

Each shard stores a range of consecutive entries. Its bytes depend on the entries alone, so they are
the same whether this process, a pool of processes or the workers of an Apache Beam pipeline write
it. Shards are written into a working folder. A shard is finished when its report is next to it:
files are written atomically, and the report is written last. After an interruption, finished shards
are kept and the others are written again.
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

MIN_SHARD_SIZE = 256
"""Entries per shard, unless that gives more than `MAX_SHARDS` shards."""

MAX_SHARDS = 4096
"""Maximum number of shards of a split."""

_WRITER_OPTIONS = "group_size:1"  # each record can be read alone
_BEAM_MISSING = "apache-beam is not installed: pip install 'pixellm_jax[beam]'"


class Skip(NamedTuple):
    """Something that was left out: an entry, or a part of an example that was stored."""

    key: str
    """Key of the entry or example."""
    whole: bool
    """Whether the entry was left out, not only a part of it."""
    reason: str


class Report(NamedTuple):
    """Result of writing one shard."""

    entries: int
    """Number of entries, stored or not."""
    examples: int
    """Number of stored examples."""
    turns: int
    """Number of questions of the stored examples."""
    targets: int
    """Number of targets of the stored examples."""
    skips: tuple[Skip, ...]


class Plan(NamedTuple):
    """Partition of a split into shards."""

    source: Source
    root: Path
    """Folder of all published datasets."""
    split: str
    folder: Path
    """Working folder."""
    shard_size: int
    """Entries per shard."""

    @property
    def name(self) -> str:
        return f"{self.source.dataset}/{self.split}"

    def shard(self, number: int) -> Path:
        return self.folder / f"{number:06d}.array_record"

    def report(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def choose_shard_size(entries: int) -> int:
    """Return the number of entries per shard, a function of the number of entries only."""
    return max(MIN_SHARD_SIZE, math.ceil(entries / MAX_SHARDS))


def write_shards(
    plan: Plan,
    entries: Sequence[Any],
    *,
    workers: int = 1,
    runner: str | None = None,
    runner_options: Sequence[str] = (),
) -> Iterator[Report]:
    """Write the shards that are not finished; yield the report of every shard in order.

    Args:
        plan: partition of the split.
        entries: all entries of the split.
        workers: processes that write shards, unless there is a `runner`.
        runner: Apache Beam runner that writes the shards.
        runner_options: options of Beam, as "--name=value".

    Raises:
        InputError: a worker was killed, or Beam is not installed. Errors of Beam are not caught.
    """
    num_shards = math.ceil(len(entries) / plan.shard_size)
    unfinished = [number for number in range(num_shards) if not _is_finished(plan, number)]
    if runner and unfinished:
        _write_with_beam(plan, unfinished, runner, runner_options)
        unfinished = []
    writing = set(unfinished)
    jobs = [(number, _entries_of_shard(plan, number, entries)) for number in unfinished]
    with _ordered_map(min(workers, len(jobs)), partial(_write_shard, plan)) as ordered_map:
        written = ordered_map(jobs)
        for number in range(num_shards):
            yield next(written) if number in writing else read_report(plan, number)


def read_report(plan: Plan, number: int) -> Report:
    """Read the report of a finished shard."""
    record = json.loads(plan.report(number).read_text(encoding="ascii"))
    return Report(**{**record, "skips": tuple(Skip(*skip) for skip in record["skips"])})


@contextlib.contextmanager
def working_folder(plan: Plan, entries: Sequence[Any]) -> Iterator[None]:
    """Lock the working folder of a plan; remove all files unless they belong to the same plan.

    Raises:
        InputError: another process has locked the folder.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with (plan.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{plan.folder}: another process prepares {plan.name}; let it finish or end it"
            ) from None
        fingerprint = _fingerprint(plan, entries)
        file = plan.folder / "made_for"
        same_plan = file.is_file() and file.read_text(encoding="ascii") == fingerprint
        for path in plan.folder.iterdir():
            if path.name.startswith(".") or (not same_plan and path.name != "lock"):
                path.unlink()
        file.write_text(fingerprint, encoding="ascii")
        yield


def _fingerprint(plan: Plan, entries: Sequence[Any]) -> str:
    """Return a digest of everything that determines the shards, except the images themselves."""
    digest = hashlib.sha256(repr((VERSION, __version__, plan._replace(folder=Path()))).encode())
    for entry in entries:
        digest.update(repr(entry).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _is_finished(plan: Plan, number: int) -> bool:
    return plan.report(number).is_file() and plan.shard(number).is_file()


def _entries_of_shard(plan: Plan, number: int, entries: Sequence[Any]) -> Sequence[Any]:
    return entries[number * plan.shard_size : (number + 1) * plan.shard_size]


def _write_shard(plan: Plan, job: tuple[int, Sequence[Any]]) -> Report:
    """Write one shard, then its report."""
    number, entries = job
    skips: list[Skip] = []
    num_turns: list[int] = []
    num_targets: list[int] = []
    with whole_file(plan.shard(number)) as path, _record_writer(path) as write:
        for entry in entries:
            try:
                example, problems = plan.source.read(entry)
                _check_pixels(example.image)
            except DamagedError as reason:
                skips.append(Skip(entry.key, True, " ".join(str(reason).split())))
                continue
            skips += (Skip(example.key, False, " ".join(p.split())) for p in problems)
            num_turns.append(sum(map(len, example.conversations)))
            num_targets.append(len(example.targets))
            write(to_record(example))
    report = Report(
        entries=len(entries),
        examples=len(num_targets),
        turns=sum(num_turns),
        targets=sum(num_targets),
        skips=tuple(skips),
    )
    with whole_file(plan.report(number)) as path:
        path.write_text(json.dumps(report._asdict()), encoding="ascii")
    return report


def _check_pixels(image: bytes) -> None:
    """Decode an image completely: readers decode only its header."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            read_image(opened, upright=False)
    except InputError as error:
        raise DamagedError(f"the picture is damaged ({error})") from None


@contextlib.contextmanager
def _record_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Open an ArrayRecord file for writing; a full disk raises OSError."""
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)

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
def _ordered_map(workers: int, function: Callable[[Any], Report]) -> Iterator[Callable]:
    """Yield a map that preserves order: over a pool of processes, or in this process."""
    if workers <= 1:
        yield partial(map, function)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_watch_parent)

    def ordered_map(jobs: Sequence[Any]) -> Iterator[Report]:
        # The workers inherit the signal mask: only this process handles SIGINT.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return pool.map(function, jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield ordered_map
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, possibly because memory ran out: run the command again "
            "to resume, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _watch_parent() -> None:
    """Exit this worker when its parent exits or is killed."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _write_with_beam(
    plan: Plan, numbers: Sequence[int], runner: str, options: Sequence[str]
) -> None:
    """Write shards on Beam's workers, which must share the file system with this process."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise InputError(_BEAM_MISSING) from None
    with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | beam.Create(numbers) | beam.Reshuffle()
        _ = shards | "Write" >> beam.Map(partial(_write_shard_by_number, plan))


def _write_shard_by_number(plan: Plan, number: int) -> None:
    entries = _cached_entries(plan.source, plan.root, plan.split)  # type: ignore[arg-type]
    _write_shard(plan, (number, _entries_of_shard(plan, number, entries)))


@lru_cache(maxsize=1)
def _cached_entries(source: Source, root: Path, split: str) -> Sequence[Any]:
    """Return the entries of a split. Each Beam worker reads the index once; none are sent to it."""
    return source.entries(root, split)
