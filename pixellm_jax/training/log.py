"""What a person sees of a training: a progress bar, `metrics.jsonl`, TensorBoard, W&B if asked."""

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

METRICS, TENSORBOARD, WANDB_ID = "metrics.jsonl", "tensorboard", "wandb_id"


class Picture(NamedTuple):
    """A picture for the log, u8 RGB [y x 3]."""

    name: str
    pixels: np.ndarray


class RunLog:
    """Writes one record per `log` to every place; `process 0` of a run alone should make one.

    `start`: the step a resumed run goes on from; later records of the file are taken out, so that
    it becomes that of an uninterrupted run. `project`: of Weights & Biases, which is optional.

    Raises:
        InputError: `folder` cannot be written, or W&B is asked for and not installed.
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
        from tensorboardX import SummaryWriter  # two seconds where it finds PyTorch

        self.path = folder / METRICS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, start)
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
        """Moves the bar."""
        self._bar.update()

    def log(self, step: int, values: Mapping[str, float], *, note: str = "") -> None:
        """Records numbers by name, e.g. {"loss/total": 1.2}; `note` stands beside the bar."""
        record = {"step": step, **{name: float(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: writing failed ({error.strerror or error}); free some space, then "
                "the same command goes on"
            ) from None
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
            if self._plain:
                print(f"step {step}: {note}", file=sys.stderr, flush=True)

    def show(self, step: int, pictures: tuple[Picture, ...]) -> None:
        """Puts pictures into TensorBoard and W&B."""
        for picture in pictures:
            self._board.add_image(picture.name, picture.pixels, step, dataformats="HWC")
        self._board.flush()
        if self._wandb is not None:
            import wandb

            images = {picture.name: wandb.Image(picture.pixels) for picture in pictures}
            self._wandb.log(images, step=step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends every output; a full disk was told of before."""
        self._bar.close()
        for output in (self._file, self._board):
            with suppress(OSError):
                output.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Takes out records after `step`, and a line that was cut off."""
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
    """The W&B run of this folder: a training that goes on goes on there, too."""
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
