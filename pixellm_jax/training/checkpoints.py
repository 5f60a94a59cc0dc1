"""Checkpoints of a training run: everything that a resume needs, as one atomic unit per step.

RUN/checkpoints/<step>/
    state/   Orbax: trained weights, moments, counters; the frozen weights too, if they were drawn
    data/    state of the data stream
    notes/   best score so far, provenance of frozen weights, the recipe
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from pixellm_jax.errors import InputError
from pixellm_jax.training.config import TrainConfig
from pixellm_jax.training.state import Blueprint, TrainState

CHECKPOINTS = "checkpoints"
STATE, DATA, NOTES = "state", "data", "notes"
SCORE = "giou"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds."""

    state: dict[str, Any]
    data: dict[str, Any]
    notes: dict[str, Any]


class RunCheckpoints:
    """Writes in the background, keeps the latest `keep_last` and the best `keep_best` by gIoU.

    `whole`: the frozen weights are saved too (they came from no checkpoint).

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, run: Path, config: TrainConfig, *, whole: bool) -> None:
        self.folder = run.absolute() / CHECKPOINTS
        self.whole = whole
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
        """The last complete step, if there is one."""
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
        """Starts writing; the state may be donated as soon as this returns.

        Raises:
            InputError: this or the write before it failed; the last good checkpoint is as it was.
        """
        if self.latest() == step:
            return
        part = saved_part(state, whole=self.whole)
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
        """Until everything is on disk.

        Raises:
            InputError: writing failed.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from None

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted at a step: best score, provenance of frozen weights.

        Raises:
            InputError: damaged.
        """
        try:
            only = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
            return dict(self._manager.restore(step, args=only)[NOTES])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.folder / str(step)}: damaged ({error}); remove this folder to go on from "
                "the checkpoint before it"
            ) from None

    def restore(self, step: int, blueprint: Blueprint, mesh: Mesh) -> Restored:
        """Reads a step straight onto a mesh, which may have another shape than the one it left.

        Raises:
            InputError: damaged, or of another recipe.
        """
        wanted = saved_part(blueprint.state(mesh), whole=self.whole)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.StandardRestore(wanted),
                        DATA: ocp.args.JsonRestore(),
                        NOTES: ocp.args.JsonRestore(),
                    }
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.folder / str(step)}: cannot go on from here ({line}); the recipe's model "
                "or trainable parts may have changed: use the recipe of the run, or another --out"
            ) from None
        return Restored(state=found[STATE], data=found[DATA], notes=found[NOTES])

    def close(self) -> None:
        """Waits and ends."""
        self._manager.close()

    def _refuse_full_disk(self, part: Mapping[str, Any]) -> None:
        """Before Orbax finds out, which prints hundreds of lines about it."""
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
            f"{self.folder}: writing a checkpoint failed ({line}); the last good one is as it was: "
            "free some space or choose another --out, and run the same command to go on"
        )


def saved_part(state: TrainState, *, whole: bool) -> dict[str, Any]:
    """What of a state goes into a checkpoint."""
    parts = state._asdict()
    if not whole:
        del parts["frozen"]
    return parts
