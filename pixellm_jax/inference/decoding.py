"""Answers token by token, for many rows at once: the functions that run on the device.

A row is one question. Its prompt is the prefix that all questions about an image share (system text
and image tokens, read once per image) and its own text. Everything has a fixed shape; rows have
lengths of their own. `engine.py` feeds these functions.

    encode -> read_prefix -> apart      once per image
    prefill -> insert                   once per question
    decode                              many steps for all rows, in place
    states_at -> decode_masks           once per target
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from pixellm_jax.inference.sampling import Sampling, choose
from pixellm_jax.model.language_model import Cache, LanguageModel
from pixellm_jax.model.pixellm import ImageFeatures, PixelLM

FREE, RUNNING, STOP, LENGTH, DAMAGED = range(5)
"""Status of a row: nothing in it; unfinished; ended by the stop token, by its budget, by NaN."""


class Prefix(NamedTuple):
    """Where a row starts: the cache of the positions before its own text.

    valid: may be attended to (padding of the canvas may not). length: positions that count.
    """

    cache: Cache
    valid: Bool[Array, "b u"]
    length: Int32[Array, "b"]


class Rows(NamedTuple):
    """Answers under way; `t` is the largest budget, `u` the capacity of the cache.

    prompt: positions before the answer. tokens: the answer so far, `said` of them, `fed` of which
    are in the cache. states[:, i]: the final-norm state that predicted tokens[:, i], which is what
    the codebook reads. chance: the probability it gave to it. passes: through the model so far.
    """

    cache: Cache
    valid: Bool[Array, "b u"]
    prompt: Int32[Array, "b"]
    budget: Int32[Array, "b"]
    sampling: Sampling
    tokens: Int32[Array, "b t"]
    states: Float[Array, "b t d"]
    chance: Float32[Array, "b t"]
    said: Int32[Array, "b"]
    fed: Int32[Array, "b"]
    passes: Int32[Array, "b"]
    status: Int32[Array, "b"]


@jax.jit
def encode(
    model: PixelLM, image: Num[Array, "b y x 3"], image_hw: Int[Array, "b 2"]
) -> ImageFeatures:
    """Everything that depends on the images alone."""
    return model.encode_image(image, image_hw)


@jax.jit
def read_prefix(
    model: PixelLM,
    image_tokens: Float[Array, "b i d"],
    image_valid: Bool[Array, "b i"],
    tokens: Int[Array, "b t"],
) -> Prefix:
    """Runs the positions that all questions about an image share. No padding: all rows are full."""
    b, t = tokens.shape
    language = model.language_model
    position = jnp.broadcast_to(jnp.arange(t), (b, t))
    valid = model.token_valid(tokens, image_valid)
    visible = jnp.tril(jnp.ones((t, t), bool)) & valid[:, None, :]
    x = model.embed(tokens, image_tokens)
    _, cache = language.extend(x, position, visible, language.empty_cache(b, t, x.dtype), position)
    return Prefix(cache, valid, jnp.full(b, t, jnp.int32))


@jax.jit
def apart(batch: Any) -> tuple[Any, ...]:
    """Splits arrays of b rows into b trees of one row."""
    rows = len(jax.tree.leaves(batch)[0])
    return tuple(jax.tree.map(lambda leaf: leaf[i : i + 1], batch) for i in range(rows))  # noqa: B023


@partial(jax.jit, static_argnames="room")
def prefill(
    language: LanguageModel,
    prefixes: Sequence[Prefix],
    tokens: Int[Array, "b t"],
    length: Int[Array, "b"],
    budget: Int[Array, "b"],
    sampling: Sampling,
    *,
    room: int,
) -> Rows:
    """Reads each row's own text after its prefix; `decode` then starts the answer.

    tokens: text only, padded on the right; `length` counts. prefixes: one per row, of one capacity.
    room: largest budget.
    """
    prefix = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *prefixes)
    b, t = tokens.shape
    cache = jax.tree.map(lambda leaf: _pad(leaf, 2, t), prefix.cache)
    valid = jnp.pad(prefix.valid, ((0, 0), (0, t)), constant_values=True)
    at = jnp.arange(t)
    position = prefix.length[:, None] + at
    place = jnp.where(at < length[:, None], position, valid.shape[1])
    visible = valid[:, None] & (jnp.arange(valid.shape[1]) <= position[..., None])
    x = language.embed(tokens).astype(cache.key[0].dtype)
    hidden, cache = language.extend(x, position, visible, cache, place)
    state = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    zero = jnp.zeros(b, jnp.int32)
    return Rows(
        cache=cache,
        valid=valid,
        prompt=(prefix.length + length).astype(jnp.int32),
        budget=budget.astype(jnp.int32),
        sampling=sampling,
        tokens=jnp.zeros((b, room), jnp.int32),
        states=jnp.zeros((b, room, state.shape[-1]), state.dtype).at[:, 0].set(state),
        chance=jnp.zeros((b, room), jnp.float32),
        said=zero,
        fed=zero,
        passes=zero + 1,
        status=zero + RUNNING,
    )


@partial(jax.jit, donate_argnames="rows")
def insert(rows: Rows, fresh: Rows, slot: Int[Array, "b"]) -> Rows:
    """Puts fresh rows into slots, over whatever was in them; a slot outside of `rows` is dropped.

    The cache is cleared behind a fresh row: what a damaged row left there would be NaN.
    """
    capacity = rows.valid.shape[1]
    return jax.tree.map(
        lambda old, new: old.at[slot].set(new, mode="drop"), rows, _grow(fresh, capacity)
    )


@partial(jax.jit, static_argnames="capacity")
def resize(rows: Rows, kept: Int[Array, "b"], *, capacity: int) -> Rows:
    """The rows number `kept` with room for `capacity` positions; a number too large: a free row."""
    found = kept < rows.status.shape[0]
    taken = jax.tree.map(lambda leaf: leaf[jnp.where(found, kept, 0)], rows)
    return _grow(taken._replace(status=jnp.where(found, taken.status, FREE)), capacity)


@partial(jax.jit, static_argnames="capacity")
def keep(rows: Rows, row: Int[Array, ""], *, capacity: int) -> Prefix:
    """What a row has read and said, as the prefix of the next question of a conversation."""
    own = jax.tree.map(lambda leaf: leaf[row][None], rows)
    cache = jax.tree.map(lambda leaf: leaf[:, :, :capacity], own.cache)
    return Prefix(cache, own.valid[:, :capacity], own.prompt + own.fed)


@partial(jax.jit, static_argnames=("stop", "group", "together"), donate_argnames="rows")
def decode(
    language: LanguageModel,
    rows: Rows,
    steps: Int[Array, ""] | int,
    enough: Int[Array, ""] | int = 1,
    *,
    stop: int,
    group: tuple[int, ...] = (),
    together: bool = True,
) -> tuple[Rows, Int32[Array, ""]]:
    """Starts fresh rows, then runs up to `steps` passes of all; returns the rows, and their number.

    Ends early when fewer rows than `enough` run, and when the cache of one is full. A row ends at
    the id `stop` or at its budget.

    group: the ids of one target. With them, the first one of them is followed by all others without
    asking the model: groups are complete and in order. The others are never chosen by themselves.
    together: the model is given the ids of a group in one pass, not one by one.
    """
    most = max(len(group), 1) if together else 1

    def goes_on(carry: tuple[Rows, Array]) -> Array:
        rows, step = carry
        running = rows.status == RUNNING
        full = running & (rows.prompt + rows.fed + most > rows.valid.shape[1])
        return (step < steps) & (running.sum() >= jnp.maximum(enough, 1)) & ~full.any()

    def pass_over(width: int, carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        """Passes of one width, as long as it is the width of the widest row."""

        def fits(carry: tuple[Rows, Array]) -> Array:
            rows, _ = carry
            widest = jnp.where(rows.status == RUNNING, rows.said - rows.fed, 0).max()
            return goes_on(carry) & ((most == 1) | ((widest > 1) == (width > 1)))

        def advance(carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
            rows, step = carry
            return _advance(language, rows, width, stop, group), step + 1

        return jax.lax.while_loop(fits, advance, carry)

    def both(carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        # Loops, because a `cond` would copy the cache at every step.
        return pass_over(most, pass_over(1, carry))

    def is_fresh(rows: Rows) -> Array:
        return (rows.status == RUNNING) & (rows.said == 0)

    def start(rows: Rows) -> Rows:
        return _append(language, rows, rows.states[:, 0], is_fresh(rows), stop, group)

    rows = jax.lax.while_loop(lambda rows: is_fresh(rows).any(), start, rows)
    carry = rows, jnp.int32(0)
    return pass_over(1, carry) if most == 1 else jax.lax.while_loop(goes_on, both, carry)


@jax.jit
def states_at(
    states: Float[Array, "b t d"], row: Int[Array, "m"], index: Int[Array, "m s k"]
) -> Float[Array, "m s k d"]:
    """The states of answers `row` that predicted their tokens number `index`."""
    return states[row[:, None, None], index]


@jax.jit
def decode_masks(
    model: PixelLM, states: Float[Array, "m s k d"], maps: Sequence[tuple[Array, ...]]
) -> Float32[Array, "m Y X"]:
    """Mask logits of targets of any images; `maps`: the features of each target's image."""
    features = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *maps)
    return model.decode_masks(states[:, None], features)[:, 0]


def generate(
    model: PixelLM,
    image: ImageFeatures,
    tokens: Int[np.ndarray, "b t"],
    length: Int[np.ndarray, "b"],
    *,
    budget: int,
    stop: int,
    group: tuple[int, ...] = (),
) -> Rows:
    """All of the above for one batch, greedily: prompts about one image each in, ended rows out.

    tokens: prompts padded on the right, `length` their true lengths; their images end at one place.
    """
    start = 1 + int(np.flatnonzero((tokens < 0).any(axis=0))[-1])
    prefix = read_prefix(model, image.tokens, image.token_valid, tokens[:, :start])
    b = len(tokens)
    sampling = Sampling(np.zeros(b, np.uint32), np.zeros(b, np.float32), np.ones(b, np.float32))
    own, budgets = tokens[:, start:], np.full(b, budget, np.int32)
    language = model.language_model
    rows = prefill(language, [prefix], own, length - start, budgets, sampling, room=budget)
    rows = resize(rows, np.arange(b), capacity=tokens.shape[1] + budget + len(group))
    return decode(language, rows, budget, stop=stop, group=group)[0]


def _advance(
    language: LanguageModel, rows: Rows, width: int, stop: int, group: tuple[int, ...]
) -> Rows:
    """One pass over up to `width` tokens per row that are not in the cache, and what follows them.

    What does not run, or is not there, is written nowhere. After more than `width` nothing follows.
    """
    capacity, room = rows.valid.shape[1], rows.tokens.shape[1]
    running = rows.status == RUNNING
    at = rows.fed[:, None] + jnp.arange(width)
    live = running[:, None] & (at < rows.said[:, None])
    tokens = jnp.take_along_axis(rows.tokens, at, axis=1, mode="clip")
    position = rows.prompt[:, None] + at
    visible = rows.valid[:, None] & (jnp.arange(capacity) <= position[..., None])
    place = jnp.where(live, position, capacity)
    x = language.embed(tokens).astype(rows.states.dtype)
    hidden, cache = language.extend(x, position, visible, rows.cache, place)
    row = jnp.arange(len(at))
    last = jnp.clip(rows.said - rows.fed - 1, 0, width - 1)
    fed = jnp.minimum(rows.said, rows.fed + width)
    rows = rows._replace(
        cache=cache,
        states=rows.states.at[row[:, None], jnp.where(live, at + 1, room)].set(hidden, mode="drop"),
        fed=jnp.where(running, fed, rows.fed),
        passes=rows.passes + running,
    )
    return _append(language, rows, hidden[row, last], running & (fed == rows.said), stop, group)


def _append(
    language: LanguageModel,
    rows: Rows,
    state: Float[Array, "b d"],
    which: Bool[Array, "b"],
    stop: int,
    group: tuple[int, ...],
) -> Rows:
    """Chooses what follows on the last state of some rows, and ends those that are at an end."""
    logits = language.logits(state[:, None])[:, 0]
    room = rows.said < rows.budget
    sound = jnp.isfinite(logits).all(axis=-1)
    allowed = logits.at[:, jnp.asarray(group[1:], jnp.int32)].set(-jnp.inf) if group else logits
    token = choose(allowed, rows.sampling, rows.said)
    row = jnp.arange(len(token))
    chance = jnp.exp(logits[row, token] - jax.nn.logsumexp(logits, axis=-1))
    new, added = token[:, None], jnp.ones_like(rows.said)
    if group:
        opens = token == group[0]
        new = jnp.where(opens[:, None], jnp.asarray(group, jnp.int32), new)
        added = jnp.where(opens, jnp.minimum(len(group), rows.budget - rows.said), 1)
    added = jnp.where(which & sound & room, added, 0)
    number = jnp.arange(new.shape[1])
    at = jnp.where(number < added[:, None], rows.said[:, None] + number, rows.tokens.shape[1])
    chances = jnp.where(number == 0, chance[:, None], 1.0)
    said = rows.said + added
    full = (said >= rows.budget) & (added < 2)  # of a group, the states are still to come
    ends = jnp.where((added == 1) & (token == stop), STOP, jnp.where(full, LENGTH, RUNNING))
    return rows._replace(
        tokens=rows.tokens.at[row[:, None], at].set(new, mode="drop"),
        chance=rows.chance.at[row[:, None], at].set(chances, mode="drop"),
        said=said,
        status=jnp.where(which, jnp.where(sound, ends, DAMAGED), rows.status),
    )


def _grow(rows: Rows, capacity: int) -> Rows:
    extra = capacity - rows.valid.shape[1]
    if extra <= 0:
        return rows._replace(
            cache=jax.tree.map(lambda leaf: leaf[:, :, :capacity], rows.cache),
            valid=rows.valid[:, :capacity],
        )
    return rows._replace(
        cache=jax.tree.map(lambda leaf: _pad(leaf, 2, extra), rows.cache),
        valid=jnp.pad(rows.valid, ((0, 0), (0, extra)), constant_values=True),
    )


def _pad(array: Array, axis: int, extra: int) -> Array:
    return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])
