"""Prepared data: random access to the examples that `pixellm prepare` stored.

A prepared folder is one split, in the layout of TFDS (`tfds.data_source` reads it too):

    OUT/refcoco_plus/testA/1.0.0/   dataset_info.json  features.json  metadata.json  skipped.jsonl
                                    refcoco_plus-testA.array_record-00000-of-00001
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipeline.example import Example, from_json, to_json
from pixellm_jax.errors import InputError

VERSION = "1.0.0"
"""Version of the stored records; older code cannot read another first number."""

INFO, METADATA, SKIPPED = "dataset_info.json", "metadata.json", "skipped.jsonl"
UNFINISHED = ".unfinished"
"""Folder of the work in progress, beside the datasets."""

_DEPTH = 3  # dataset / split / version


def features() -> tfds.features.FeaturesDict:
    """Return the TFDS features of a record: the encoded image, its key, and the rest as JSON."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "key": text(), "record": text()}
    )


def to_record(example: Example) -> bytes:
    """The `features` of an example as `tf.train.Example`; the same bytes in every process.

    (TFDS's own serializer writes the features in an order that changes from process to process.)
    """
    texts = {"key": example.key, "record": to_json(example)}
    values = {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
    feature = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        for name, value in (values | {"image": example.image}).items()
    }
    record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    return record.SerializeToString(deterministic=True)


def from_record(record: bytes) -> Example:
    """The inverse of `to_record`."""
    feature = tf_example_pb2.Example.FromString(record).features.feature
    text = feature["record"].bytes_list.value[0].decode("utf-8", "surrogatepass")
    return from_json(text, feature["image"].bytes_list.value[0])


class StoredSplit(Sequence[Example]):
    """The examples of one prepared split, read from the disk one by one.

    In memory are only the number of examples of each shard and, of shards in use, where their
    records begin. It can be pickled, and threads may share it: Grain's workers do both.

    metadata: what was counted when it was prepared: dataset, split, examples, conversations, ...

    Raises:
        InputError: `folder` does not hold a prepared split, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self.dataset, self.split = str(self.metadata["dataset"]), str(self.metadata["split"])
            (split,) = info["splits"]
            lengths = [int(length) for length in split["shardLengths"]]
            stem, version = f"{info['name']}-{split['name']}", str(info["version"])
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a prepared split, it has no {Path(error.filename).name}: name a "
                "folder that `pixellm prepare` made"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} is damaged ({type(error).__name__}: {error} in {INFO} or {METADATA}): "
                "remove it and prepare it again"
            ) from None
        if version.partition(".")[0] != VERSION.partition(".")[0]:
            raise InputError(
                f"{folder} holds version {version} of the records, this is version {VERSION}: "
                "prepare the data again"
            )
        self._length = sum(lengths)
        self.shards = tuple(
            folder / f"{stem}.array_record-{i:05d}-of-{len(lengths):05d}"
            for i in range(len(lengths))
        )
        missing = [shard.name for shard in self.shards if not shard.is_file()]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}: copy or prepare it again")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example, or the list of those in a slice.

        Raises:
            IndexError: there is no such example.
            InputError: a shard is damaged.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) * (index < 0)
        if not 0 <= place < len(self):
            raise IndexError(f"{self.folder}: no example {index}, it has {len(self)}")
        source = self._opened
        try:
            return from_record(source[place])
        except (OSError, RuntimeError, ValueError, LookupError, DecodeError) as error:
            raise self._damaged(error) from None

    def __repr__(self) -> str:
        return f"StoredSplit({str(self.folder)!r}: {len(self)} examples)"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    @cached_property
    def _opened(self) -> ArrayRecordDataSource:
        try:
            source = ArrayRecordDataSource([str(shard) for shard in self.shards])
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from None
        if len(source) != len(self):
            raise self._damaged(f"{len(source)} records instead of {len(self)}")
        return source

    def _damaged(self, found: object) -> InputError:
        return InputError(f"{self.folder} is damaged ({found}): copy or prepare it again")


def find_splits(
    folder: Path, *, dataset: str | None = None, split: str | None = None
) -> list[StoredSplit]:
    """The prepared splits in a folder (of one split, of one dataset, or of all), sorted by name.

    `dataset`, `split`: only these.

    Raises:
        InputError: there is none, or a folder is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: name one that `pixellm prepare` made")
    found = [
        path.parent
        for depth in range(_DEPTH + 1)
        for path in folder.glob("*/" * depth + INFO)
        if not any(part.startswith((".", "incomplete.")) for part in path.relative_to(folder).parts)
    ]
    splits = sorted(map(StoredSplit, found), key=lambda stored: (stored.dataset, stored.split))
    kept = [
        stored
        for stored in splits
        if dataset in (None, stored.dataset) and split in (None, stored.split)
    ]
    if kept:
        return kept
    names = ", ".join(f"{stored.dataset}/{stored.split}" for stored in splits)
    wanted = f"{dataset or '*'}/{split or '*'}"
    raise InputError(
        f"{folder} has no {wanted}, it has {names}"
        if names
        else f"{folder} holds no prepared data: name a folder that `pixellm prepare` made"
    )
