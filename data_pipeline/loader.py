"""Deterministic data loader: the batch of a step is a pure function of the config and the step.

The only state is the number of the next step. Item i of the stream depends on the config and on i
alone: the mixture interleaves the datasets by weight, each dataset is shuffled once per epoch with
the seed, and the conversations of an example are sampled with the key (seed, i). Batches are
therefore the same with any number of hosts (each host takes its slice of every batch) and of
workers, and after a resume.
"""

from __future__ import annotations

import logging
import signal
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import flags

from data_pipeline.collate import LoadedBatch, Sample, collate, make_sample
from data_pipeline.config import DataConfig
from data_pipeline.errors import DamagedError
from data_pipeline.example import Example
from data_pipeline.sampling import PhiloxSampler
from data_pipeline.sources.shapes.dataset import DATASETS, Shapes
from data_pipeline.storage.stored import find_splits
from data_pipeline.transforms import Composed, compose
from pixellm_jax.batch import Batch
from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.text.vocabulary import Vocabulary

NUM_EPOCHS = 1 << 20
"""Number of epochs after which the stream of a dataset ends (Grain cannot slice endless ones)."""

NUM_THREADS = 4
"""Threads that prepare samples in this process when there are no workers."""


def sample_conversations(
    example: Example, index: int, data: DataConfig, group_text: str
) -> tuple[Composed, ...]:
    """Sample the conversations of an example at position `index` of the stream.

    The key of the sampler is (seed, index). The order of the conversations is random, so that a
    budget does not always drop the last ones.

    Raises:
        DamagedError: no conversation can be composed from the example.
    """
    sampler = PhiloxSampler(seed=data.seed, epoch=0, index=index)
    composed = compose(example, sampler, data.compose, group_text=group_text)
    return tuple(composed[i] for i in sampler.permutation(len(composed)))


class ToSample(grain.transforms.MapWithIndex):
    """Grain transform from an example to a sample: conversations, token ids, one packed row."""

    def __init__(self, vocabulary: Vocabulary, data: DataConfig, model: ModelConfig) -> None:
        self.vocabulary = vocabulary
        self.data = data
        self.model = model

    def map_with_index(self, index: int, element: Example) -> Sample:
        """Return the sample of an example; a damaged example gives an empty row with a reason."""
        shared = (self.vocabulary, self.data, self.model)
        try:
            composed = sample_conversations(element, index, self.data, self.vocabulary.group_text)
            return make_sample(element, composed, *shared)
        except DamagedError as error:
            return make_sample(element, (), *shared)._replace(damaged=str(error))


def open_datasets(data: DataConfig, folder: Path | None) -> dict[str, Sequence[Example]]:
    """Open the splits that the mixture names.

    Splits of the shapes ("shapes/train", "shapes_simple/val") are generated. All others are read
    from `folder`, which `pixellm prepare` made; None if there is no such folder.

    Raises:
        InputError: one of them is missing or damaged.
    """
    names = {name for family in data.families for name in family.datasets}
    splits = dict[str, Sequence[Example]]()
    for name in sorted(names):
        dataset, slash, split = name.partition("/")
        if not slash:
            raise InputError(f"data.families names {name!r}: write it as dataset/split")
        if dataset in DATASETS:
            splits[name] = Shapes(split=split, level=DATASETS[dataset])
        elif folder is None:
            raise InputError(f"data.families names {name!r}: give a folder of `pixellm prepare`")
        else:
            (splits[name],) = find_splits(folder, dataset=dataset, split=split)
    return splits


def stream(
    data: DataConfig, datasets: Mapping[str, Sequence[Example]]
) -> grain.MapDataset[Example]:
    """Return the mixture of examples: random access, and practically endless.

    Raises:
        InputError: a dataset of the config is not among `datasets`, or is empty.
    """
    families = []
    for family in data.families:
        members = []
        for name in family.datasets:
            if name not in datasets or not len(datasets[name]):
                state = "empty" if name in datasets else "missing"
                raise InputError(
                    f"dataset {name!r} is {state}; prepare it with `pixellm prepare`, or take it "
                    "out of data.families"
                )
            source = grain.MapDataset.source(datasets[name])
            key = zlib.crc32(name.encode())
            members.append(source.shuffle(seed=(data.seed + key) % (1 << 32)).repeat(NUM_EPOCHS))
        families.append(grain.MapDataset.mix(members))
    return grain.MapDataset.mix(families, [family.weight for family in data.families])


class Loader(Iterator[Batch]):
    """Checkpointable iterator over the batches of this host.

    Example:
        >>> from data_pipeline.config import FamilyConfig
        >>> family = FamilyConfig(weight=1.0, datasets=("shapes/train",))
        >>> data = DataConfig(families=(family,), batch=2, length=256)
        >>> loader = Loader(data, model.config, vocabulary, open_datasets(data, None))
        >>> next(loader).tokens.shape
        (2, 256)
        >>> loader.close()

    Args:
        data: mixture, budgets and workers.
        model: model that the batches are for.
        vocabulary: vocabulary of the model.
        datasets: examples by "dataset/split"; must contain every dataset of the mixture.
        host: index of this host, which takes rows [host b, (host + 1) b) of every batch, where
            b = data.batch / hosts.
        hosts: number of hosts.
        start: first step.

    Attributes:
        step: number of the next step.
        counts: examples, conversations over budget and damaged examples so far; every damaged
            example is logged with its reason.
        keys: "dataset/split/key" of the examples of the last batch.

    Raises:
        InputError: a dataset is missing, or `hosts` does not divide the batch.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        vocabulary: Vocabulary,
        datasets: Mapping[str, Sequence[Example]],
        *,
        host: int = 0,
        hosts: int = 1,
        start: int = 0,
    ) -> None:
        if data.batch % hosts:
            raise InputError(f"data.batch={data.batch} cannot be divided among {hosts} hosts")
        samples = stream(data, datasets).map_with_index(ToSample(vocabulary, data, model))
        self._batches = samples.batch(data.batch // hosts, batch_fn=collate)[host::hosts]
        self._workers = data.workers
        self._iterator: grain.DatasetIterator[LoadedBatch] | None = None
        self.counts: Counter[str] = Counter()
        self.step = start
        self.keys: tuple[str, ...] = ()

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        loaded = next(self._iterator)
        self.step += 1
        self.keys = loaded.keys
        self.counts["examples"] += len(loaded.keys)
        self.counts["conversations over budget"] += loaded.dropped
        self.counts["damaged examples"] += len(loaded.damaged)
        for key, reason in loaded.damaged.items():
            logging.warning("%s: left out: %s", key, reason)
        return loaded.batch

    def get_state(self) -> dict[str, Any]:
        """Return the complete state of the loader: a small JSON value (Orbax `JsonSave`)."""
        return {"step": self.step, "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `get_state`, saved with any number of hosts and workers."""
        self.close()
        self.step = int(state["step"])
        self.counts = Counter(state["counts"])

    def close(self) -> None:
        """Stop the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> grain.DatasetIterator[LoadedBatch]:
        remaining = self._batches[self.step :]
        if not self._workers:
            threads = grain.ReadOptions(
                num_threads=NUM_THREADS, prefetch_buffer_size=2 * NUM_THREADS
            )
            return iter(remaining.to_iter_dataset(threads))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its flags in the workers
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        processes = grain.MultiprocessingOptions(num_workers=self._workers)
        batches = remaining.to_iter_dataset(one_thread)
        return iter(batches.mp_prefetch(processes, worker_init_fn=_ignore_signals))


def _ignore_signals(*_: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker: the training process handles them, then stops it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
