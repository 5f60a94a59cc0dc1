"""Log of a training run: progress bar, `metrics.jsonl`, TensorBoard and, optionally, W&B."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"


class LogImage(NamedTuple):
    """An image for the log, u8 RGB [y x 3]."""

    name: str
    pixels: np.ndarray


class RunLog:
    """Log of a run, one record per call of `log`; only process 0 of a run makes one.

    Args:
        folder: folder of the run.
        steps: length of the run.
        start: step from which the run resumes. Later records of metrics.jsonl are removed, so that
            the file equals the log of an uninterrupted run.
        recipe: configuration shown by W&B.
        project: Weights & Biases project; None logs without W&B.

    Raises:
        InputError: `folder` cannot be written, or W&B is requested and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        start: int = 0,
        recipe: Mapping[str, Any] | None = None,
        project: str | None = None,
    ) -> None:
        from tensorboardX import SummaryWriter  # takes two seconds where PyTorch is installed

        self.path = folder / METRICS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(self.path, start)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{folder}: cannot write here ({error.strerror or error}); choose another --out"
            ) from None
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1)
        self._wandb = _start_wandb(project, folder, recipe or {}) if project else None
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=None,
        )
        self._plain = self._bar.disable

    def step(self) -> None:
        """Advance the bar by one step."""
        self._bar.update()

    def log(self, step: int, values: Mapping[str, float], *, note: str = "") -> None:
        """Record numbers by name, e.g. {"loss/total": 1.2}; `note` is shown next to the bar."""
        record = {"step": step, **{name: float(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: writing failed ({error.strerror or error}); free some space, then "
                "run the same command to resume"
            ) from None
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
            if self._plain:
                print(f"step {step}: {note}", file=sys.stderr, flush=True)

    def show(self, step: int, images: tuple[LogImage, ...]) -> None:
        """Log images to TensorBoard and W&B."""
        for image in images:
            self._board.add_image(image.name, image.pixels, step, dataformats="HWC")
        self._board.flush()
        if self._wandb is not None:
            import wandb

            values = {image.name: wandb.Image(image.pixels) for image in images}
            self._wandb.log(values, step=step)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close every output; a full disk was already reported by `log`."""
        self._bar.close()
        for output in (self._file, self._board):
            with suppress(OSError):
                output.close()
        if self._wandb is not None:
            self._wandb.finish()


def _truncate(path: Path, step: int) -> None:
    """Remove the records after `step`, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(f"{line}\n" for line in kept))


def _start_wandb(project: str, folder: Path, recipe: Mapping[str, Any]) -> Any:
    """Return the W&B run of this folder; a resumed training resumes its run."""
    try:
        import wandb
    except ImportError:
        raise InputError(
            "--wandb needs Weights & Biases: pip install 'pixellm_jax[wandb]'"
        ) from None
    name = folder / WANDB_ID
    run = wandb.init(
        project=project,
        dir=str(folder),
        config=dict(recipe),
        id=name.read_text(encoding="utf-8") if name.exists() else None,
        resume="allow",
    )
    write_whole(name, run.id)
    return run
