"""Random access to prepared data: the examples that `pixellm prepare` stored.

The folder of a split has the layout of TFDS (`tfds.data_source` reads it, too):

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

INFO = "dataset_info.json"
METADATA = "metadata.json"
SKIPPED = "skipped.jsonl"
UNFINISHED = ".unfinished"
"""Folder of unfinished shards, next to the datasets."""

_DEPTH = 3  # dataset / split / version


def features() -> tfds.features.FeaturesDict:
    """Return the TFDS features of a record: the encoded image, its key, and the rest as JSON."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "key": text(), "record": text()}
    )


def to_record(example: Example) -> bytes:
    """Serialise an example as `tf.train.Example` with the `features`; deterministic.

    (The order of the features that TFDS's serialiser writes differs from process to process.)
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
    """Parse an example from the record that `to_record` wrote."""
    feature = tf_example_pb2.Example.FromString(record).features.feature
    text = feature["record"].bytes_list.value[0].decode("utf-8", "surrogatepass")
    return from_json(text, feature["image"].bytes_list.value[0])


class StoredSplit(Sequence[Example]):
    """Sequence of the examples of one prepared split, read from disk one by one.

    Only the number of examples per shard and the record offsets of opened shards are in memory. It
    is picklable and thread-safe, as Grain's workers require.

        stored = StoredSplit(Path("prepared/muse/train/1.0.0"))
        example = stored[len(stored) - 1]

    Attributes:
        folder: folder of the split.
        dataset: published name of the dataset.
        split: published name of the split.
        metadata: counts of the preparation: entries, examples, turns, targets, skipped, ...
        shards: paths of the ArrayRecord files.

    Raises:
        InputError: `folder` is not a prepared split, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self.dataset = str(self.metadata["dataset"])
            self.split = str(self.metadata["split"])
            (split,) = info["splits"]
            lengths = [int(length) for length in split["shardLengths"]]
            stem = f"{info['name']}-{split['name']}"
            version = str(info["version"])
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
        """Read one example, or a list of the examples of a slice.

        Raises:
            IndexError: the index is out of range.
            InputError: a shard is damaged.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) * (index < 0)
        if not 0 <= position < len(self):
            raise IndexError(f"{self.folder}: no example {index}, it has {len(self)}")
        source = self._data_source
        try:
            return from_record(source[position])
        except (OSError, RuntimeError, ValueError, LookupError, DecodeError) as error:
            raise self._damaged(error) from None

    def __repr__(self) -> str:
        return f"StoredSplit({str(self.folder)!r}: {len(self)} examples)"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_data_source"}

    @cached_property
    def _data_source(self) -> ArrayRecordDataSource:
        try:
            source = ArrayRecordDataSource([str(shard) for shard in self.shards])
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from None
        if len(source) != len(self):
            raise self._damaged(f"{len(source)} records instead of {len(self)}")
        return source

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.folder} is damaged ({reason}): copy or prepare it again")


def find_splits(
    folder: Path, *, dataset: str | None = None, split: str | None = None
) -> list[StoredSplit]:
    """Find the prepared splits in a folder, sorted by name.

    Args:
        folder: folder of one split, of one dataset, or of all datasets.
        dataset: find only splits of this dataset.
        split: find only splits of this name.

    Raises:
        InputError: there is no such split, or a folder is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: name one that `pixellm prepare` made")
    folders = [
        path.parent
        for depth in range(_DEPTH + 1)
        for path in folder.glob("*/" * depth + INFO)
        if not any(part.startswith((".", "incomplete.")) for part in path.relative_to(folder).parts)
    ]
    splits = sorted(map(StoredSplit, folders), key=lambda stored: (stored.dataset, stored.split))
    matching = [
        stored
        for stored in splits
        if dataset in (None, stored.dataset) and split in (None, stored.split)
    ]
    if matching:
        return matching
    if not splits:
        raise InputError(
            f"{folder} holds no prepared data: name a folder that `pixellm prepare` made"
        )
    names = ", ".join(f"{stored.dataset}/{stored.split}" for stored in splits)
    raise InputError(f"{folder} has no {dataset or '*'}/{split or '*'}, it has {names}")
