"""TFDS builders: one split of one dataset -> a folder of ArrayRecord shards, whole or not there.

One class serves every dataset: what differs between them is in their `Source`. The writer of TFDS's
own `GeneratorBasedBuilder` is not used: it runs in one process, starts over after an interruption,
and from 1 GB on needs TensorFlow. `shards.py` writes instead; this builder turns what it wrote into
a TFDS folder in one step. Each split is a folder (to TFDS, a config) of its own, so that splits are
prepared, copied and redone one by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from data_pipeline.errors import AbsentError
from data_pipeline.reading import Source
from data_pipeline.storage.shards import (
    Plan,
    Report,
    Skip,
    run_length,
    working_folder,
    write_shards,
)
from data_pipeline.storage.stored import SKIPPED, UNFINISHED, VERSION, StoredSplit, features
from pixellm_jax.errors import InputError


class ExampleBuilder(FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of one split: `download_and_prepare()` stores the examples that `source` reads.

    Damaged entries are left out, counted in `info.metadata` and listed in skipped.jsonl with key
    and reason; with `strict` they are an error. `run`: entries per shard. `progress` is called
    with the number of further entries done and the total. `writing`: options of
    `shards.write_shards`.

    Raises:
        AbsentError: (`download_and_prepare`, as all of these) there are no entries.
        InputError: no entry can be used, `strict` and something is damaged, or another process
            prepares the split. There is no folder then; finished shards are kept, and the next call
            resumes from them.
    """

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # where TFDS would look for checksums of downloads

    def __init__(
        self,
        source: Source,
        split: str,
        root: Path,
        out: Path,
        *,
        strict: bool = False,
        run: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **writing: Any,
    ) -> None:
        self.name = folder_name(source.dataset)
        self._strict, self._progress, self._writing = strict, progress, writing
        folder = out.resolve() / UNFINISHED / f"{self.name}-{split}"
        self.plan = Plan(source, root.resolve(), split, folder, run or 0)
        config = tfds.core.BuilderConfig(name=split, version=VERSION)
        super().__init__(data_dir=out.resolve(), config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.plan.name}, prepared for PixelLM.",
            features=features(),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Fills `data_dir`, which is a temporary folder until this returns."""
        plan = self.plan
        entries = plan.source.entries(plan.root, plan.split)
        if not entries:
            raise AbsentError(
                f"the index of {plan.source.dataset} has nothing in split {plan.split}"
            )
        plan = plan._replace(run=plan.run or run_length(len(entries)))
        with working_folder(plan, entries):
            self._remove_leftovers()
            reports = list[Report]()
            for report in write_shards(plan, entries, **self._writing):
                reports.append(report)
                self._progress(report.entries, len(entries))
                if self._strict:
                    refuse(plan.name, report.skips)
            skips = [skip for report in reports for skip in report.skips]
            self._count(reports, skips)
            with open(self.data_path / SKIPPED, "w", encoding="utf-8", errors="replace") as file:
                for skip in skips:
                    file.write(json.dumps(skip._asdict(), ensure_ascii=False) + "\n")
            self._take_shards(plan, [report.examples for report in reports])
            shutil.rmtree(plan.folder)
        with contextlib.suppress(OSError):  # stays while other splits are at work in it
            plan.folder.parent.rmdir()

    def _log_download_bytes(self) -> None:
        """TFDS would announce on standard output what it is about to download: nothing."""

    def _log_download_done(self) -> None:
        """Do nothing: there is no download to log."""

    def _remove_leftovers(self) -> None:
        """Temporary folders of earlier calls that were killed."""
        for path in Path(self.data_path).parent.glob("incomplete.*"):
            if path != Path(self.data_path):
                shutil.rmtree(path)

    def _count(self, reports: Sequence[Report], skips: Sequence[Skip]) -> None:
        total = Counter[str]()
        for report in reports:
            total.update({name: getattr(report, name) for name in Report._fields[:-1]})
        if not total["examples"]:
            reason = f"; the first, {skips[0].key}: {skips[0].reason}" if skips else ""
            raise InputError(
                f"{self.plan.name}: none of {total['entries']} entries can be used{reason}"
            )
        self.info.metadata.update(
            dataset=self.plan.source.dataset,
            split=self.plan.split,
            **total,
            skipped=sum(skip.whole for skip in skips),
            parts_left_out=sum(not skip.whole for skip in skips),
        )

    def _take_shards(self, plan: Plan, lengths: Sequence[int]) -> None:
        """Moves the shards that are not empty into the folder, under the names TFDS knows."""
        template = self._get_filename_template(plan.split)
        kept = [number for number, length in enumerate(lengths) if length]
        paths = [
            Path(template.sharded_filepath(shard_index=index, num_shards=len(kept)))
            for index in range(len(kept))
        ]
        for number, path in zip(kept, paths, strict=True):
            os.replace(plan.shard(number), path)
        info = tfds.core.SplitInfo(
            name=plan.split,
            shard_lengths=[lengths[number] for number in kept],
            num_bytes=sum(path.stat().st_size for path in paths),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.SplitDict([info]))


class Prepared(NamedTuple):
    """A prepared split, what was left out of it, and whether it was there before."""

    stored: StoredSplit
    skips: tuple[Skip, ...]
    found: bool


def prepare(source: Source, split: str, root: Path, out: Path, **options: Any) -> Prepared:
    """Store a split below `out`, resume an interrupted run, or return a finished one.

    `options`: as of `ExampleBuilder`.

    Raises:
        InputError: as `ExampleBuilder`, or the folder cannot be written, or the disk is full.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _quiet_log(), tempfile.TemporaryDirectory() as downloads:
            builder = ExampleBuilder(source, split, root, out, **options)
            found = builder.is_prepared()
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        raise InputError(
            f"{out}: writing failed ({error.strerror or error}); finished shards are kept, free "
            "some space or see who owns the folder, and run the command again to go on"
        ) from error
    finally:
        made = out / folder_name(source.dataset)
        for folder in (made / split, made, *new):
            with contextlib.suppress(OSError):  # stays if something is in it
                folder.rmdir()
    stored = StoredSplit(Path(builder.data_path))
    skips = read_skips(stored)
    if options.get("strict"):
        refuse(f"{source.dataset}/{split}", skips)
    return Prepared(stored, skips, found)


def read_skips(stored: StoredSplit) -> tuple[Skip, ...]:
    """Return the entries left out of a prepared split, in their order."""
    with (stored.folder / SKIPPED).open(encoding="utf-8") as lines:
        return tuple(Skip(**json.loads(line)) for line in lines)


def refuse(name: str, skips: Sequence[Skip]) -> None:
    """Raises InputError if anything was left out."""
    if skips:
        first = skips[0]
        raise InputError(
            f"{name}: {len(skips)} damaged, the first is {first.key}: {first.reason}; mend it, or "
            "leave out --strict to skip what is damaged"
        )


def folder_name(dataset: str) -> str:
    """TFDS takes letters, digits and "_": refcoco+ -> refcoco_plus."""
    return dataset.replace("+", "_plus").replace("-", "_")


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """TFDS warns of every config that its class does not list."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
