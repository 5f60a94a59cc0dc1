"""Device functions of batched decoding: prefill, decode steps with a key-value cache, masks.

Each row of a batch decodes one request. Its prompt is a prefix that all requests about an image
share (system text and image tokens, encoded once per image) and the request's text. All shapes are
fixed, while every row has its own length. `engine.py` drives these functions.

    encode -> read_prefix -> unstack    once per image
    prefill -> insert                   once per request
    decode                              many steps of all rows, with the cache updated in place
    states_at -> decode_masks           once per target
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from pixellm_jax.inference.sampling import Sampling, sample_tokens
from pixellm_jax.model.language_model import Cache, LanguageModel
from pixellm_jax.model.pixellm import ImageFeatures, PixelLM

FREE, RUNNING, STOP, LENGTH, NON_FINITE = range(5)
"""Status of a row: empty; unfinished; ended by the stop token, by its limit, by NaN or infinity."""


class Prefix(NamedTuple):
    """Key-value cache of the positions before a request's text.

    Attributes:
        cache: keys and values.
        valid: positions that may be attended to (padding of the canvas may not).
        length: number of positions in use.
    """

    cache: Cache
    valid: Bool[Array, "b u"]
    length: Int32[Array, "b"]


class DecodeState(NamedTuple):
    """Running batch of answers; `t` is the token capacity, `u` the capacity of the cache.

    Attributes:
        cache: keys and values of prompts and answers.
        valid: positions that may be attended to.
        prompt_length: number of positions before the answer.
        max_new_tokens: limit of the answer.
        sampling: sampling parameters.
        tokens: the answer so far.
        states: final-norm hidden states; states[:, i] predicted tokens[:, i] and is what the
            codebook reads.
        token_prob: probability of each token when it was selected.
        num_generated: number of `tokens` so far.
        num_cached: number of `tokens` whose keys and values are in the cache.
        num_steps: forward passes so far, the prompt's included.
        status: FREE, RUNNING, STOP, LENGTH or NON_FINITE.
    """

    cache: Cache
    valid: Bool[Array, "b u"]
    prompt_length: Int32[Array, "b"]
    max_new_tokens: Int32[Array, "b"]
    sampling: Sampling
    tokens: Int32[Array, "b t"]
    states: Float[Array, "b t d"]
    token_prob: Float32[Array, "b t"]
    num_generated: Int32[Array, "b"]
    num_cached: Int32[Array, "b"]
    num_steps: Int32[Array, "b"]
    status: Int32[Array, "b"]


@jax.jit
def encode(
    model: PixelLM, image: Num[Array, "b y x 3"], image_hw: Int[Array, "b 2"]
) -> ImageFeatures:
    """Compute everything that depends on the images alone."""
    return model.encode_image(image, image_hw)


@jax.jit
def read_prefix(
    model: PixelLM,
    image_tokens: Float[Array, "b i d"],
    image_valid: Bool[Array, "b i"],
    tokens: Int[Array, "b t"],
) -> Prefix:
    """Prefill the positions that all requests about an image share; rows are not padded."""
    b, t = tokens.shape
    language = model.language_model
    position = jnp.broadcast_to(jnp.arange(t), (b, t))
    valid = model.token_valid(tokens, image_valid)
    visible = jnp.tril(jnp.ones((t, t), bool)) & valid[:, None, :]
    x = model.embed(tokens, image_tokens)
    _, cache = language.extend(x, position, visible, language.empty_cache(b, t, x.dtype), position)
    return Prefix(cache, valid, jnp.full(b, t, jnp.int32))


@jax.jit
def unstack(batch: Any) -> tuple[Any, ...]:
    """Split a tree of arrays with b rows into b trees with one row each."""
    rows = len(jax.tree.leaves(batch)[0])
    return tuple(jax.tree.map(lambda leaf: leaf[i : i + 1], batch) for i in range(rows))  # noqa: B023


@partial(jax.jit, static_argnames="token_capacity")
def prefill(
    language: LanguageModel,
    prefixes: Sequence[Prefix],
    tokens: Int[Array, "b t"],
    length: Int[Array, "b"],
    max_new_tokens: Int[Array, "b"],
    sampling: Sampling,
    *,
    token_capacity: int,
) -> DecodeState:
    """Run each request's text after its prefix; `decode` then generates the answer.

    Args:
        language: the language model.
        prefixes: prefixes of equal capacity, whose rows together are the rows of the batch.
        tokens: text ids, padded on the right.
        length: number of ids that are not padding.
        max_new_tokens: limit of each answer.
        sampling: sampling parameters of each row.
        token_capacity: number of new tokens that the state can hold.
    """
    prefix = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *prefixes)
    b, t = tokens.shape
    cache = jax.tree.map(lambda leaf: _pad(leaf, 2, t), prefix.cache)
    valid = jnp.pad(prefix.valid, ((0, 0), (0, t)), constant_values=True)
    offset = jnp.arange(t)
    position = prefix.length[:, None] + offset
    place = jnp.where(offset < length[:, None], position, valid.shape[1])
    visible = valid[:, None] & (jnp.arange(valid.shape[1]) <= position[..., None])
    x = language.embed(tokens).astype(cache.key[0].dtype)
    hidden, cache = language.extend(x, position, visible, cache, place)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    zero = jnp.zeros(b, jnp.int32)
    return DecodeState(
        cache=cache,
        valid=valid,
        prompt_length=(prefix.length + length).astype(jnp.int32),
        max_new_tokens=max_new_tokens.astype(jnp.int32),
        sampling=sampling,
        tokens=jnp.zeros((b, token_capacity), jnp.int32),
        states=jnp.zeros((b, token_capacity, last.shape[-1]), last.dtype).at[:, 0].set(last),
        token_prob=jnp.zeros((b, token_capacity), jnp.float32),
        num_generated=zero,
        num_cached=zero,
        num_steps=zero + 1,
        status=zero + RUNNING,
    )


@partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, new: DecodeState, indices: Int[Array, "b"]) -> DecodeState:
    """Overwrite the rows `indices` with new rows; a row whose index is out of range is dropped.

    The cache is zeroed behind a new row, because a row that ended as NON_FINITE leaves NaN there.
    """
    capacity = state.valid.shape[1]
    return jax.tree.map(
        lambda old, row: old.at[indices].set(row, mode="drop"), state, _set_capacity(new, capacity)
    )


@partial(jax.jit, static_argnames="capacity")
def resize(state: DecodeState, indices: Int[Array, "b"], *, capacity: int) -> DecodeState:
    """Gather the rows `indices` into a batch with a cache of `capacity` positions.

    An index that is out of range makes a free row.
    """
    exists = indices < state.status.shape[0]
    gathered = jax.tree.map(lambda leaf: leaf[jnp.where(exists, indices, 0)], state)
    status = jnp.where(exists, gathered.status, FREE)
    return _set_capacity(gathered._replace(status=status), capacity)


@partial(jax.jit, static_argnames="capacity")
def extract_prefix(state: DecodeState, row: Int[Array, ""], *, capacity: int) -> Prefix:
    """Copy a row's prompt and answer as the prefix of a follow-up request."""
    one = jax.tree.map(lambda leaf: leaf[row][None], state)
    cache = jax.tree.map(lambda leaf: leaf[:, :, :capacity], one.cache)
    return Prefix(cache, one.valid[:, :capacity], one.prompt_length + one.num_cached)


@partial(jax.jit, static_argnames=("stop", "group", "group_in_one_step"), donate_argnames="state")
def decode(
    language: LanguageModel,
    state: DecodeState,
    max_steps: Int[Array, ""] | int,
    min_running: Int[Array, ""] | int = 1,
    *,
    stop: int,
    group: tuple[int, ...] = (),
    group_in_one_step: bool = True,
) -> tuple[DecodeState, Int32[Array, ""]]:
    """Run up to `max_steps` decode steps of all running rows.

    Decoding returns early when fewer than `min_running` rows are running, and when the cache of a
    running row is full. A row ends at the id `stop` or at its limit of new tokens.

    With a `group`, codebook tokens are generated by jump-forward decoding: after the first id of
    the group the others follow without sampling, so groups are always complete and in order. The
    other ids of the group are never sampled by themselves.

    Args:
        language: the language model.
        state: the batch; its buffers are donated.
        max_steps: maximum number of steps.
        min_running: number of running rows below which decoding returns.
        stop: id that ends an answer.
        group: ids of one codebook token group; empty for plain decoding.
        group_in_one_step: feed the ids of a group to the model in one step, not one by one.

    Returns:
        The new state and the number of steps.
    """
    max_width = max(len(group), 1) if group_in_one_step else 1

    def can_step(carry: tuple[DecodeState, Array]) -> Array:
        state, step = carry
        running = state.status == RUNNING
        end = state.prompt_length + state.num_cached + max_width
        full = running & (end > state.valid.shape[1])
        enough = running.sum() >= jnp.maximum(min_running, 1)
        return (step < max_steps) & enough & ~full.any()

    def steps_of_width(width: int, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        """Run steps of one width for as long as the widest row needs it."""

        def needs_width(carry: tuple[DecodeState, Array]) -> Array:
            state, _ = carry
            num_new = state.num_generated - state.num_cached
            widest = jnp.where(state.status == RUNNING, num_new, 0).max()
            return can_step(carry) & ((max_width == 1) | ((widest > 1) == (width > 1)))

        def advance(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
            state, step = carry
            return _step(language, state, width, stop, group), step + 1

        return jax.lax.while_loop(needs_width, advance, carry)

    def steps_of_both_widths(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        # Loops, because a `cond` would copy the cache at every step.
        return steps_of_width(max_width, steps_of_width(1, carry))

    def is_new(state: DecodeState) -> Array:
        return (state.status == RUNNING) & (state.num_generated == 0)

    def first_token(state: DecodeState) -> DecodeState:
        return _append(language, state, state.states[:, 0], is_new(state), stop, group)

    state = jax.lax.while_loop(lambda state: is_new(state).any(), first_token, state)
    carry = state, jnp.int32(0)
    if max_width == 1:
        return steps_of_width(1, carry)
    return jax.lax.while_loop(can_step, steps_of_both_widths, carry)


@jax.jit
def states_at(
    states: Float[Array, "b t d"], row: Int[Array, "m"], index: Int[Array, "m s k"]
) -> Float[Array, "m s k d"]:
    """Gather the hidden states that predicted the tokens `index` of the rows `row`."""
    return states[row[:, None, None], index]


@jax.jit
def decode_masks(
    model: PixelLM, states: Float[Array, "m s k d"], maps: Sequence[tuple[Array, ...]]
) -> Float32[Array, "m Y X"]:
    """Decode mask logits of targets of any images; `maps` are the maps of each target's image."""
    features = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *maps)
    return model.decode_masks(states[:, None], features)[:, 0]


def _step(
    language: LanguageModel, state: DecodeState, width: int, stop: int, group: tuple[int, ...]
) -> DecodeState:
    """Feed up to `width` tokens per row that are not cached yet, and append the next token.

    Rows that are not running, and places without a token, are not written. A row with more than
    `width` uncached tokens gets no next token yet.
    """
    capacity, token_capacity = state.valid.shape[1], state.tokens.shape[1]
    running = state.status == RUNNING
    index = state.num_cached[:, None] + jnp.arange(width)
    is_fed = running[:, None] & (index < state.num_generated[:, None])
    tokens = jnp.take_along_axis(state.tokens, index, axis=1, mode="clip")
    position = state.prompt_length[:, None] + index
    visible = state.valid[:, None] & (jnp.arange(capacity) <= position[..., None])
    place = jnp.where(is_fed, position, capacity)
    x = language.embed(tokens).astype(state.states.dtype)
    hidden, cache = language.extend(x, position, visible, state.cache, place)
    row = jnp.arange(len(index))
    last = jnp.clip(state.num_generated - state.num_cached - 1, 0, width - 1)
    num_cached = jnp.minimum(state.num_generated, state.num_cached + width)
    target = jnp.where(is_fed, index + 1, token_capacity)
    state = state._replace(
        cache=cache,
        states=state.states.at[row[:, None], target].set(hidden, mode="drop"),
        num_cached=jnp.where(running, num_cached, state.num_cached),
        num_steps=state.num_steps + running,
    )
    is_ready = running & (num_cached == state.num_generated)
    return _append(language, state, hidden[row, last], is_ready, stop, group)


def _append(
    language: LanguageModel,
    state: DecodeState,
    hidden: Float[Array, "b d"],
    selected: Bool[Array, "b"],
    stop: int,
    group: tuple[int, ...],
) -> DecodeState:
    """Append the token that follows the last hidden state of selected rows; end finished rows."""
    logits = language.logits(hidden[:, None])[:, 0]
    below_limit = state.num_generated < state.max_new_tokens
    finite = jnp.isfinite(logits).all(axis=-1)
    allowed = logits.at[:, jnp.asarray(group[1:], jnp.int32)].set(-jnp.inf) if group else logits
    token = sample_tokens(allowed, state.sampling, state.num_generated)
    row = jnp.arange(len(token))
    prob = jnp.exp(logits[row, token] - jax.nn.logsumexp(logits, axis=-1))
    new = token[:, None]
    num_new = jnp.ones_like(state.num_generated)
    if group:
        opens_group = token == group[0]
        new = jnp.where(opens_group[:, None], jnp.asarray(group, jnp.int32), new)
        remaining = state.max_new_tokens - state.num_generated
        num_new = jnp.where(opens_group, jnp.minimum(len(group), remaining), 1)
    num_new = jnp.where(selected & finite & below_limit, num_new, 0)
    offset = jnp.arange(new.shape[1])
    index = state.num_generated[:, None] + offset
    index = jnp.where(offset < num_new[:, None], index, state.tokens.shape[1])
    probs = jnp.where(offset == 0, prob[:, None], 1.0)
    num_generated = state.num_generated + num_new
    # After a group, the hidden states of its tokens are still to be computed.
    at_limit = (num_generated >= state.max_new_tokens) & (num_new < 2)
    stopped = (num_new == 1) & (token == stop)
    status = jnp.where(stopped, STOP, jnp.where(at_limit, LENGTH, RUNNING))
    return state._replace(
        tokens=state.tokens.at[row[:, None], index].set(new, mode="drop"),
        token_prob=state.token_prob.at[row[:, None], index].set(probs, mode="drop"),
        num_generated=num_generated,
        status=jnp.where(selected, jnp.where(finite, status, NON_FINITE), state.status),
    )


def _set_capacity(state: DecodeState, capacity: int) -> DecodeState:
    """Cut or pad the cache to `capacity` positions."""
    extra = capacity - state.valid.shape[1]
    if extra <= 0:
        return state._replace(
            cache=jax.tree.map(lambda leaf: leaf[:, :, :capacity], state.cache),
            valid=state.valid[:, :capacity],
        )
    return state._replace(
        cache=jax.tree.map(lambda leaf: _pad(leaf, 2, extra), state.cache),
        valid=jnp.pad(state.valid, ((0, 0), (0, extra)), constant_values=True),
    )


def _pad(array: Array, axis: int, extra: int) -> Array:
    return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])
