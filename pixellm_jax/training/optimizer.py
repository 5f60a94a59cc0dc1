"""What is trained, and how it is updated. Optimizer, checkpoints and export all ask here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pixellm_jax.axes import logical_axes
from pixellm_jax.errors import InputError
from pixellm_jax.model.lora import LORA
from pixellm_jax.training.config import OptimizerConfig, TrainConfig

HIDDEN = frozenset(("embed", "vision", "mlp", "heads", "kv_heads", "head"))
"""Axes between which a matrix is one of Muon's; tables of ids, places and patches are not."""

MUON_RMS = 0.4
"""Of the entries of Muon's updates, before the learning rate; those of AdamW are about as large."""


def trainable_names(
    parameters: Iterable[str], constants: Iterable[str], config: TrainConfig
) -> frozenset[str]:
    """The dotted names of the parameters that are trained.

    The longest entry of `config.trainable` and `config.frozen` that names a parameter or a module
    around it decides. LoRA pairs are always trained, `constants` never.

    Raises:
        InputError: a parameter is neither trainable nor frozen or both, or an entry names nothing.
    """
    entries = [(entry, True) for entry in config.trainable]
    entries += [(entry, False) for entry in config.frozen]
    both = sorted({*config.trainable} & {*config.frozen})
    if both:
        raise InputError(f"train config: {both} are both in trainable and in frozen; take one out")
    names, unclear, used = set[str](), list[str](), set[str]()
    for name in parameters:
        if LORA in name.split("."):
            names.add(name)
            continue
        fitting = [(entry, kind) for entry, kind in entries if f"{name}.".startswith(f"{entry}.")]
        used.update(entry for entry, _ in fitting)
        if not fitting:
            unclear.append(name)
        elif max(fitting, key=lambda pair: len(pair[0]))[1]:
            names.add(name)
    if unclear:
        raise InputError(
            f"train config: neither trainable nor frozen: {', '.join(sorted(unclear)[:8])}"
            f"{' ...' if len(unclear) > 8 else ''}; name them, or a module around them"
        )
    constants = list(constants)
    idle = [
        entry
        for entry, _ in entries
        if entry not in used and not any(f"{name}.".startswith(f"{entry}.") for name in constants)
    ]
    if idle:
        raise InputError(f"train config: {idle} name nothing in the model; correct or remove them")
    return frozenset(names)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: linear from 0 over the warm-up, then down to 0 at `steps`.

    Update 0 runs at learning_rate / warmup; DeepSpeed's off-by-one is not copied
    (docs/reference_notes.md 4.1).
    """
    peak, warmup = config.learning_rate, config.warmup
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    rising = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: Mapping[str, str]
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon with `schedule`.

    axes: logical axes of every parameter that is trained, by its dotted name.
    """
    rate = schedule(config, steps)
    if config.method == "adamw":
        update = optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        )
    else:
        update = muon(
            rate,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers={name: _matrix(own) for name, own in axes.items()},
            weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            eps=config.eps,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _matrix(axes: str) -> MuonDimensionNumbers | None:
    """Which axes are the rows and the columns of a matrix of `HIDDEN`; None: it is none.

    "layer embed heads head" is one matrix of (1) x (2, 3) for every layer.
    """
    names = logical_axes(axes)
    sides: list[list[int]] = []
    for i, name in enumerate(names):
        if name == "head" and i and names[i - 1] in ("heads", "kv_heads"):
            sides[-1].append(i)
        elif name != "layer":
            sides.append([i])
    if len(sides) != 2 or set(names) - HIDDEN - {"layer"}:
        return None
    return MuonDimensionNumbers(tuple(sides[0]), tuple(sides[1]))


def state_shardings(
    optimizer: optax.GradientTransformation,
    trainable: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, jax.sharding.Sharding],
    other: jax.sharding.Sharding,
) -> optax.OptState:
    """Moments, under the names of their parameters, lie where these do; the rest at `other`."""

    def place(path: tuple, _: object) -> jax.sharding.Sharding:
        name = getattr(path[-1], "key", None) if path else None
        return shardings.get(name, other) if isinstance(name, str) else other

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, dict(trainable)))
