"""What is trained, and how it is updated. Optimizer, checkpoints and export all ask here."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import optax

from pixellm_jax.errors import InputError
from pixellm_jax.model.lora import LORA
from pixellm_jax.train_config import OptimizerConfig, TrainConfig


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

    Update 0 runs at learning_rate / warmup; DeepSpeed's off-by-one is not copied (reference.md
    4.1).
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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with `schedule`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def state_shardings(
    optimizer: optax.GradientTransformation,
    trainable: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, jax.sharding.Sharding],
    other: jax.sharding.Sharding,
) -> optax.OptState:
    """Moments lie where their parameters lie; counters at `other`."""
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: other,
    )
