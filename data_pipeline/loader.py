"""The stream of batches: mixed, drawn, packed and shared out, each a pure function of its step.

Nothing has a state but the number of the next step. The item at place i of the stream depends on
the config and on i alone: the mixture is an interleaving by weights, each dataset runs through its
epochs in an order fixed by the seed, and what is drawn from an example is keyed by (seed, i). So a
batch is the same on any number of hosts (each takes its slice of every batch), with any number of
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

from data_pipeline.collate import Loaded, Sample, collate, make_sample
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

EPOCHS = 1 << 20
"""Number of epochs after which the stream of a dataset ends (Grain cannot slice endless ones)."""

THREADS = 4
"""Threads that prepare samples in this process when there are no workers."""


def draw(example: Example, index: int, data: DataConfig, group_text: str) -> tuple[Composed, ...]:
    """The conversations of an example at a place of the stream, keyed by (seed, place).

    They come in random order, so that those that do not fit a budget are not always the last.

    Raises:
        DamagedError: nothing can be asked about it as it is.
    """
    sampler = PhiloxSampler(seed=data.seed, epoch=0, index=index)
    composed = compose(example, sampler, data.compose, group_text=group_text)
    return tuple(composed[i] for i in sampler.permutation(len(composed)))


class Draw(grain.transforms.MapWithIndex):
    """Example -> sample: conversations drawn with the key (seed, place in the stream)."""

    def __init__(self, vocabulary: Vocabulary, data: DataConfig, model: ModelConfig) -> None:
        self.vocabulary = vocabulary
        self.data = data
        self.model = model

    def map_with_index(self, index: int, element: Example) -> Sample:
        """Sample, encode, pack and fit one example.

        A damaged example gives an empty row, which is reported.
        """
        shared = (self.vocabulary, self.data, self.model)
        try:
            composed = draw(element, index, self.data, self.vocabulary.group_text)
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
    """The mixture of examples, with random access and practically without an end.

    Raises:
        InputError: a dataset of the config is not among `datasets`, or is empty.
    """
    families = []
    for family in data.families:
        chains = []
        for name in family.datasets:
            if name not in datasets or not len(datasets[name]):
                state = "empty" if name in datasets else "not there"
                raise InputError(
                    f"dataset {name!r} is {state}; prepare it with `pixellm prepare`, or take it "
                    "out of data.families"
                )
            source = grain.MapDataset.source(datasets[name])
            key = zlib.crc32(name.encode())
            chains.append(source.shuffle(seed=(data.seed + key) % (1 << 32)).repeat(EPOCHS))
        families.append(grain.MapDataset.mix(chains))
    return grain.MapDataset.mix(families, [family.weight for family in data.families])


class Loader(Iterator[Batch]):
    """Batches of this host, from step `start` on.

    `host`, `hosts`: this host takes the slice [host * b, (host + 1) * b) of every step's batch,
    b = batch / hosts. What was left out is counted in `counts`, and damaged examples are logged.

    Raises:
        InputError: a dataset is missing, or the hosts do not divide the batch.
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
            raise InputError(f"data.batch={data.batch} cannot be shared by {hosts} hosts")
        samples = stream(data, datasets).map_with_index(Draw(vocabulary, data, model))
        self._batches = samples.batch(data.batch // hosts, batch_fn=collate)[host::hosts]
        self._workers = data.workers
        self._running: grain.DatasetIterator[Loaded] | None = None
        self.counts: Counter[str] = Counter()
        self.step = start
        self.keys: tuple[str, ...] = ()

    def __next__(self) -> Batch:
        if self._running is None:
            self._running = self._open()
        loaded = next(self._running)
        self.step += 1
        self.keys = loaded.keys
        self.counts["examples"] += len(loaded.keys)
        self.counts["conversations over budget"] += loaded.dropped
        self.counts["damaged examples"] += len(loaded.damaged)
        for key, reason in loaded.damaged.items():
            logging.warning("%s: left out: %s", key, reason)
        return loaded.batch

    def get_state(self) -> dict[str, Any]:
        """All there is to save: a small JSON value (Orbax `JsonSave`)."""
        return {"step": self.step, "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the step of `get_state`, whatever number of hosts or workers it came from."""
        self.close()
        self.step = int(state["step"])
        self.counts = Counter(state["counts"])

    def close(self) -> None:
        """Ends the workers."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _open(self) -> grain.DatasetIterator[Loaded]:
        rest = self._batches[self.step :]
        if not self._workers:
            return iter(
                rest.to_iter_dataset(
                    grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
                )
            )
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its flags in the workers
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        processes = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(rest.to_iter_dataset(one).mp_prefetch(processes, worker_init_fn=_stay))


def _stay(*_: int) -> None:
    """A worker ends with its loader, not by a signal that is meant for the training."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
