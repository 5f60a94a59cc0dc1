"""Checkpoints of a training run: everything that a resume needs, one atomic unit per step.

RUN/recipe.json
RUN/checkpoints/<step>/
    state/   Orbax: trained weights, moments, counters; frozen weights unless read from --init
    data/    state of the data stream
    notes/   best score so far, provenance of the frozen weights, the recipe
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pixellm_jax.errors import InputError
from pixellm_jax.files import write_whole
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.state import Blueprint, TrainState

RECIPE = "recipe.json"
CHECKPOINTS = "checkpoints"
STATE = "state"
DATA = "data"
NOTES = "notes"
SCORE = "giou"

FIXED_KEYS = (
    "model",
    "data",
    "tokenizer",
    "train.seed",
    "train.lora",
    "train.trainable",
    "train.frozen",
)
"""Recipe keys that must not change during a run."""

FREE_KEYS = ("model.dtype", "model.remat", "data.workers")
"""Exceptions below `FIXED_KEYS` that may change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """Content of a checkpoint."""

    state: dict[str, Any]
    data: dict[str, Any]
    notes: dict[str, Any]


class RunCheckpoints:
    """Checkpoints of a run, written in the background.

    Keeps the latest `config.keep_last` and the best `config.keep_best` by validation gIoU.

    Args:
        run: folder of the run.
        config: training configuration.
        save_frozen: save the frozen weights, too; needed where no checkpoint provides them.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, run: Path, config: TrainConfig, *, save_frozen: bool) -> None:
        self.folder = run.absolute() / CHECKPOINTS
        self.save_frozen = save_frozen
        policies: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(config.keep_last)
        ]
        if config.keep_best:
            best = preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[SCORE],
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics[SCORE],
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = {
            STATE: ocp.StandardCheckpointHandler(),
            DATA: ocp.JsonCheckpointHandler(),
            NOTES: ocp.JsonCheckpointHandler(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise self._failure(error) from None

    def latest(self) -> int | None:
        """Return the last complete step, None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data: Mapping[str, Any],
        notes: Mapping[str, Any],
        score: float | None,
    ) -> None:
        """Start writing; the state may be donated as soon as this returns.

        Raises:
            InputError: this or the previous write failed; the last good checkpoint is intact.
        """
        if self.latest() == step:
            return
        part = _saved_part(state, save_frozen=self.save_frozen)
        self.wait()
        self._refuse_full_disk(part)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.StandardSave(part),
                        DATA: ocp.args.JsonSave(dict(data)),
                        NOTES: ocp.args.JsonSave(dict(notes)),
                    }
                ),
                metrics=None if score is None else {SCORE: score},
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from None

    def wait(self) -> None:
        """Block until everything is on disk.

        Raises:
            InputError: writing failed.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from None

    def notes(self, step: int) -> dict[str, Any]:
        """Read the notes of a step: best score, provenance of the frozen weights, the recipe.

        Raises:
            InputError: the checkpoint is damaged.
        """
        try:
            only = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
            return dict(self._manager.restore(step, args=only)[NOTES])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.folder / str(step)}: damaged ({error}); remove this folder to resume "
                "from the previous checkpoint"
            ) from None

    def restore(self, step: int, blueprint: Blueprint, mesh: Mesh) -> Restored:
        """Read a step onto a mesh, whose shape may differ from the mesh that wrote it.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another recipe.
        """
        target = _saved_part(blueprint.state(mesh), save_frozen=self.save_frozen)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.StandardRestore(target),
                        DATA: ocp.args.JsonRestore(),
                        NOTES: ocp.args.JsonRestore(),
                    }
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.folder / str(step)}: cannot resume from here ({line}); the recipe's "
                "model or trainable parts may have changed: use the recipe of the run, or another "
                "--out"
            ) from None
        return Restored(state=restored[STATE], data=restored[DATA], notes=restored[NOTES])

    def close(self) -> None:
        """Wait for pending writes and release the manager."""
        self._manager.close()

    def _refuse_full_disk(self, part: Mapping[str, Any]) -> None:
        """Check the free space first: Orbax prints hundreds of lines about a full disk."""
        needed = sum(
            shard.data.nbytes
            for array in jax.tree.leaves(part)
            for shard in array.addressable_shards
            if shard.replica_id == 0
        )
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._failure(error) from None
        if free < needed:
            raise self._failure(
                OSError(f"it takes up to {needed / 2**20:.1f} MiB, {free / 2**20:.1f} are free")
            )

    def _failure(self, error: Exception) -> InputError:
        line = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        return InputError(
            f"{self.folder}: writing a checkpoint failed ({line}); the last good one is intact: "
            "free some space or choose another --out, and run the same command to resume"
        )


def write_recipe(run: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe to the folder of the run.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / RECIPE, json.dumps(recipe, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{run}: cannot write here ({error.strerror or error}); choose another --out"
        ) from None


def refuse_other_recipe(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume with a recipe of another run; lengths, rates and meshes may change.

    Raises:
        InputError: a key of `FIXED_KEYS` differs; the message names the first one.
    """
    old = dict(_flatten(before))
    new = dict(_flatten(json.loads(json.dumps(now))))
    if not old or not new:  # one of them is unknown
        return
    for key in sorted(old.keys() | new.keys()):
        fixed = any(f"{key}.".startswith(f"{name}.") for name in FIXED_KEYS)
        if fixed and key not in FREE_KEYS and old.get(key) != new.get(key):
            raise InputError(
                f"{run}: the run began with {key}={old.get(key)!r}, now it is {new.get(key)!r}: "
                "use the same value, or another --out (with --init to start from this run's model)"
            )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _saved_part(state: TrainState, *, save_frozen: bool) -> dict[str, Any]:
    parts = state._asdict()
    if not save_frozen:
        del parts["frozen"]
    return parts
