"""Folders like the ones of `pixellm evaluate`, with known masks and without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images import rle

HW = (47, 61)

SETTINGS = {
    "benchmark": "muse",
    "split": "val",
    "mode": "generated",
    "data": "pictures",
    "checkpoint": "model",
    "checkpoint_hash": "0123",
    "limit": None,
    "version": "0.0.0",
}


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(HW, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def question(
    number: int,
    matched: Sequence[tuple[np.ndarray | None, np.ndarray]] = (),
    missed: Sequence[np.ndarray] = (),
    extra: Sequence[np.ndarray] = (),
    **others: Any,
) -> QuestionRecord:
    """Return a record: pairs of a predicted (None if missed) and a true mask, and extra masks."""
    predicted, truth, pairs = [], [], []
    for mask, true in [*matched, *((None, true) for true in missed)]:
        if mask is None:
            pairs.append((None, len(truth), 0, int(true.sum())))
        else:
            areas = int((mask & true).sum()), int((mask | true).sum())
            pairs.append((len(predicted), len(truth), *areas))
            predicted.append(mask)
        truth.append(true)
    pairs += [(len(predicted) + i, None, 0, int(mask.sum())) for i, mask in enumerate(extra)]
    predicted += extra
    record = QuestionRecord(
        id=f"muse/val/{number}/0",
        picture=f"photos/{number}.png",
        hw=HW,
        question=f"What is question {number}?",
        expected="These: " + ", ".join(["[SEG]"] * len(truth)) + ".",
        answer="It is " + " and ".join(["[SEG]"] * len(predicted)) + ".",
        groups=("few" if len(truth) <= 3 else "many",),
        truth=tuple(map(rle.encode, truth)),
        predicted=tuple(map(rle.encode, predicted)),
        void=None,
        descriptions=tuple(f"thing {i}" for i in range(len(truth))),
        pairs=tuple(pairs),
        reason="stop",
    )
    return record._replace(**others)


def random_questions(count: int, seed: int, quality: float = 0.7) -> list[QuestionRecord]:
    """Return questions with 0 to 5 true boxes; `seed` and `quality` change predictions only."""
    truth_rng = np.random.default_rng(0)
    prediction_rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        matched = []
        extra = []
        for _ in range(truth_rng.integers(0, 6)):
            top, left = truth_rng.integers(0, 30, 2)
            true = box(top, left, *truth_rng.integers(8, 16, 2))
            moved = np.roll(true, tuple(prediction_rng.integers(0, 5, 2)), (0, 1))
            matched.append((moved if prediction_rng.uniform() < quality else None, true))
        if prediction_rng.uniform() < 0.2:
            extra.append(box(*prediction_rng.integers(0, 30, 2), 7, 5))
        records.append(question(number, matched, extra=extra))
    return records


def judged(
    record: QuestionRecord, scores: Sequence[int], name: str = "made-up judge"
) -> QuestionRecord:
    """Return the record with scores of its matched targets, in the order of the true masks."""
    left = iter(scores)
    owners = {truth for predicted, truth, _, _ in record.pairs if predicted is not None}
    row = [next(left) if truth in owners else None for truth in range(len(record.truth))]
    return record._replace(judge={"judge": name, "scores": row})


def write_run(out: Path, records: Sequence[QuestionRecord], **settings: Any) -> Path:
    """Write the folder of a run and return it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(SETTINGS | settings), encoding="utf-8")
    text = "".join(record.to_json() + "\n" for record in records)
    (out / "questions.jsonl").write_text(text, encoding="utf-8")
    return out
