"""TFDS builder that stores a split of a dataset as a folder of ArrayRecord shards, atomically.

One class serves every dataset; the differences between datasets are in their `Source`. The writer
of TFDS's `GeneratorBasedBuilder` is not used: it runs in one process, starts over after an
interruption, and needs TensorFlow above 1 GB. `shards.py` writes the shards instead, and this
builder turns them into a TFDS folder in one step. Each split is a separate folder (a config of
TFDS), so splits can be prepared, copied and prepared again one by one.
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
    choose_shard_size,
    working_folder,
    write_shards,
)
from data_pipeline.storage.stored import SKIPPED, UNFINISHED, VERSION, StoredSplit, features
from pixellm_jax.errors import InputError


class ExampleBuilder(FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of one split: `download_and_prepare()` stores the examples that `source` reads.

    Damaged entries are left out, counted in `info.metadata` and listed in skipped.jsonl with key
    and reason.

    Args:
        source: reader of the dataset.
        split: split to store.
        root: folder of all published datasets.
        out: folder of all prepared datasets.
        strict: raise an error if anything is damaged.
        shard_size: entries per shard; None chooses it from their number.
        progress: called after each shard with its number of entries and the total.
        **writing: options of `shards.write_shards`.

    Raises:
        AbsentError: (by `download_and_prepare`, as the other error) there are no entries.
        InputError: no entry can be used, `strict` and something is damaged, or another process
            prepares the split. No folder is created then; finished shards are kept, and the next
            call resumes from them.
    """

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # location of the checksums of downloads

    def __init__(
        self,
        source: Source,
        split: str,
        root: Path,
        out: Path,
        *,
        strict: bool = False,
        shard_size: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **writing: Any,
    ) -> None:
        self.name = folder_name(source.dataset)
        self._strict = strict
        self._progress = progress
        self._writing = writing
        folder = out.resolve() / UNFINISHED / f"{self.name}-{split}"
        self.plan = Plan(source, root.resolve(), split, folder, shard_size or 0)
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
        """Fill `data_dir`, which is a temporary folder until this method returns."""
        plan = self.plan
        entries = plan.source.entries(plan.root, plan.split)
        if not entries:
            raise AbsentError(
                f"the index of {plan.source.dataset} has nothing in split {plan.split}"
            )
        plan = plan._replace(shard_size=plan.shard_size or choose_shard_size(len(entries)))
        with working_folder(plan, entries):
            self._remove_leftovers()
            reports = list[Report]()
            for report in write_shards(plan, entries, **self._writing):
                reports.append(report)
                self._progress(report.entries, len(entries))
                if self._strict:
                    require_no_skips(plan.name, report.skips)
            skips = [skip for report in reports for skip in report.skips]
            self._set_metadata(reports, skips)
            with open(self.data_path / SKIPPED, "w", encoding="utf-8", errors="replace") as file:
                for skip in skips:
                    file.write(json.dumps(skip._asdict(), ensure_ascii=False) + "\n")
            self._move_shards(plan, [report.examples for report in reports])
            shutil.rmtree(plan.folder)
        with contextlib.suppress(OSError):  # not empty while other splits are being prepared
            plan.folder.parent.rmdir()

    def _log_download_bytes(self) -> None:
        """Do nothing; TFDS would print the size of the download, although there is none."""

    def _log_download_done(self) -> None:
        """Do nothing: there is no download to log."""

    def _remove_leftovers(self) -> None:
        """Remove the temporary folders of earlier calls that were killed."""
        for path in Path(self.data_path).parent.glob("incomplete.*"):
            if path != Path(self.data_path):
                shutil.rmtree(path)

    def _set_metadata(self, reports: Sequence[Report], skips: Sequence[Skip]) -> None:
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

    def _move_shards(self, plan: Plan, lengths: Sequence[int]) -> None:
        """Move the shards that are not empty into the folder, under the file names of TFDS."""
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
    """A prepared split, what was left out of it, and whether it already existed."""

    stored: StoredSplit
    skips: tuple[Skip, ...]
    existed: bool


def prepare(source: Source, split: str, root: Path, out: Path, **options: Any) -> Prepared:
    """Store a split below `out`, resume an interrupted run, or return a finished one.

    `options` are the keyword arguments of `ExampleBuilder`.

        stored, skips, existed = prepare(Jsonl(), "train", Path("birds"), Path("prepared"))

    Raises:
        InputError: as `ExampleBuilder`, or the folder cannot be written, or the disk is full.
    """
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _quiet_log(), tempfile.TemporaryDirectory() as downloads:
            builder = ExampleBuilder(source, split, root, out, **options)
            existed = builder.is_prepared()
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        raise InputError(
            f"{out}: writing failed ({error.strerror or error}); finished shards are kept, free "
            "some space or see who owns the folder, and run the command again to resume"
        ) from error
    finally:
        dataset_folder = out / folder_name(source.dataset)
        for folder in (dataset_folder / split, dataset_folder, *new_folders):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    stored = StoredSplit(Path(builder.data_path))
    skips = read_skips(stored)
    if options.get("strict"):
        require_no_skips(f"{source.dataset}/{split}", skips)
    return Prepared(stored, skips, existed)


def read_skips(stored: StoredSplit) -> tuple[Skip, ...]:
    """Return everything that was left out of a prepared split, in the order of the entries."""
    with (stored.folder / SKIPPED).open(encoding="utf-8") as lines:
        return tuple(Skip(**json.loads(line)) for line in lines)


def require_no_skips(name: str, skips: Sequence[Skip]) -> None:
    """Raise InputError if anything was left out of the split `name`."""
    if skips:
        first = skips[0]
        raise InputError(
            f"{name}: {len(skips)} damaged, the first is {first.key}: {first.reason}; repair it, "
            "or omit --strict to skip damaged entries"
        )


def folder_name(dataset: str) -> str:
    """Return a name of letters, digits and "_", as TFDS requires: refcoco+ -> refcoco_plus."""
    return dataset.replace("+", "_plus").replace("-", "_")


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Silence the warning of TFDS about a config that its builder class does not list."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
