"""Optimizer: selection of trained parameters, learning rate schedule, AdamW or Muon."""

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
"""Axes of the matrices that Muon updates; tables of ids, positions and patches have others."""

MUON_RMS = 0.4
"""RMS of the entries of Muon's updates before the learning rate, similar to AdamW's updates."""


def trainable_names(
    parameters: Iterable[str], constants: Iterable[str], config: TrainConfig
) -> frozenset[str]:
    """Return the dotted names of the trained parameters.

    The longest entry of `config.trainable` and `config.frozen` that names a parameter or an
    enclosing module decides. LoRA pairs are always trained, `constants` never.

    Raises:
        InputError: a parameter is neither trainable nor frozen, or both; or an entry matches
            nothing.
    """
    entries = [(entry, True) for entry in config.trainable]
    entries += [(entry, False) for entry in config.frozen]
    both = sorted({*config.trainable} & {*config.frozen})
    if both:
        raise InputError(f"train config: {both} are both in trainable and in frozen; remove one")
    names = set[str]()
    undecided = list[str]()
    used = set[str]()
    for name in parameters:
        if LORA in name.split("."):
            names.add(name)
            continue
        matches = [
            (entry, trained) for entry, trained in entries if f"{name}.".startswith(f"{entry}.")
        ]
        used.update(entry for entry, _ in matches)
        if not matches:
            undecided.append(name)
        elif max(matches, key=lambda pair: len(pair[0]))[1]:
            names.add(name)
    if undecided:
        raise InputError(
            f"train config: neither trainable nor frozen: {', '.join(sorted(undecided)[:8])}"
            f"{' ...' if len(undecided) > 8 else ''}; name them, or an enclosing module"
        )
    constants = list(constants)
    unused = [
        entry
        for entry, _ in entries
        if entry not in used and not any(f"{name}.".startswith(f"{entry}.") for name in constants)
    ]
    if unused:
        raise InputError(
            f"train config: {unused} match nothing in the model; correct or remove them"
        )
    return frozenset(names)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by update: linear warm-up from 0, then decay to 0 at `steps`.

    Update 0 runs at learning_rate / warmup; DeepSpeed's off-by-one is not copied
    (docs/reference_notes.md 4.1).
    """
    peak = config.learning_rate
    warmup = config.warmup
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
    """Return clipping by the global norm, then AdamW or Muon with `schedule`.

    Args:
        config: optimizer configuration.
        steps: updates of the run.
        axes: logical axes of every trained parameter by dotted name.
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
            muon_weight_dimension_numbers={
                name: _matrix_axes(names) for name, names in axes.items()
            },
            weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            eps=config.eps,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _matrix_axes(axes: str) -> MuonDimensionNumbers | None:
    """Return the axes of the rows and columns of a matrix of `HIDDEN` axes, None for other tensors.

    "layer embed heads head" is one matrix of (1) x (2, 3) per layer.
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
    """Return shardings of the optimizer state: moments as their parameters, the rest `other`."""

    def place(path: tuple, _: object) -> jax.sharding.Sharding:
        name = getattr(path[-1], "key", None) if path else None
        return shardings.get(name, other) if isinstance(name, str) else other

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, dict(trainable)))
