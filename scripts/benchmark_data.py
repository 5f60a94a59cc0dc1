"""Benchmark the data pipeline on one core: examples per second from JPEG to packed batch.

    python scripts/benchmark_data.py --source DATASET_ROOT --tokenizer CHECKPOINT/tokenizer

Compares three workloads on the images of MUSE train, in alternating rounds: this pipeline; the
steps of the released loader (decode, resize for CLIP and for SAM, normalise both, rasterise the
polygons of every target); and the same steps without the SAM tensor, which the model never reads.
Then prints a profile of this pipeline, and the memory that an index of 250,000 examples takes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from data_pipeline.config import DataConfig, FamilyConfig
from data_pipeline.example import Example
from data_pipeline.loader import ToSample, stream
from data_pipeline.sources.muse import Muse
from pixellm_jax.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from pixellm_jax.images.geometry import fitted_size
from pixellm_jax.text.vocabulary import Vocabulary

DATA = DataConfig(
    families=(FamilyConfig(weight=1.0, datasets=("muse/train",)),),
    batch=1,
    length=1024,
    targets=32,
)


class Synthetic(Sequence[Example]):
    """A split of `length` entries that are all the same example, without reading any file."""

    def __init__(self, example: Example, length: int) -> None:
        self.example = example
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return self.example._replace(key=str(index))


def released_steps(image: bytes, item: dict, *, sam: bool) -> int:
    """Run the released loader's steps on a MUSE image, in its order; return the bytes produced."""
    pixels = Image.open(io.BytesIO(image)).convert("RGB")
    size = 0
    for canvas in (1024, 448) if sam else (448,):
        h, w = fitted_size((pixels.height, pixels.width), canvas)
        fitted = np.asarray(pixels.resize((w, h), Image.Resampling.BILINEAR), np.float32)
        normal = (fitted - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        padded = np.zeros((3, canvas, canvas), np.float32)
        padded[:, :h, :w] = normal.transpose(2, 0, 1)
        size += padded.nbytes
    for question in item["answers"]:
        for target in question:
            rles = coco.frPyObjects(target["segmentation"], item["height"], item["width"])
            mask = coco.decode(rles)
            mask = mask.sum(axis=2).astype(np.uint8) if mask.ndim == 3 else mask
            size += mask.astype(np.float32).nbytes
    return size


def rate(work: Callable[[int], object], count: int) -> float:
    """Return calls per second of processor time."""
    start = time.process_time()
    for i in range(count):
        work(i)
    return count / (time.process_time() - start)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    source = Muse()
    entries = list(source.entries(options.source, "train"))
    raw = json.loads((options.source / "muse" / "muse_train.json").read_text())
    examples = []
    items = []
    for entry in entries:
        item = raw[int(entry.key.rpartition("/")[2])]
        if item.get("questions"):
            examples.append(source.read(entry).example)
            items.append(item)
    vocabulary = Vocabulary.load(options.tokenizer, scales=2)
    samples = stream(DATA, {"muse/train": examples}).map_with_index(
        ToSample(vocabulary, DATA, ModelConfig())
    )
    images = [example.image for example in examples]
    workloads: dict[str, Callable[[int], object]] = {
        "this pipeline": lambda i: samples[i],
        "released steps": lambda i: released_steps(images[i], items[i], sam=True),
        "released steps without SAM": lambda i: released_steps(images[i], items[i], sam=False),
    }
    count = len(examples)
    rates: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(options.rounds):
        for name, work in workloads.items():
            rates[name].append(rate(work, count))
    jpeg_bytes = sum(map(len, images)) / count
    for name, samples_per_second in rates.items():
        median = statistics.median(samples_per_second)
        ours = statistics.median(rates["this pipeline"])
        print(
            f"{name:28s} {median:7.1f} examples/s "
            f"({min(samples_per_second):.1f} to {max(samples_per_second):.1f}), "
            f"{median * jpeg_bytes / 1e6:6.2f} MB/s of JPEG, {ours / median:5.2f} x"
        )

    profile = cProfile.Profile()
    profile.runcall(lambda: [samples[i] for i in range(2 * count)])
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
    print("\n".join(line for line in text.getvalue().splitlines()[7:] if line.strip()))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = stream(DATA, {"muse/train": Synthetic(examples[0], 250_000)})
    keys = {big[i].key for i in range(0, 250_000, 1000)}
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"250,000 examples: {len(keys)} read in shuffled order, {(after - before) / 1024:.1f} MiB"
    )


if __name__ == "__main__":
    main()
