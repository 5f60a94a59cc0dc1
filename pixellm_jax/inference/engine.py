"""Continuous-batching inference engine: requests join and leave the running batch at any step.

The batch lives on the device (`decoding.DecodeState`), one row per request. Each `Engine.step`
admits waiting requests into free rows, runs some decode steps, and returns the completions of rows
that finished, so the batch stays full for as long as requests are waiting. All shapes come from a
few buckets (1, 4, 16, ... rows, `round_capacity` of positions), so few programs are compiled.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from pixellm_jax.inference import decoding
from pixellm_jax.inference.compilation import CompileCounter, bucket, round_capacity
from pixellm_jax.inference.decoding import FREE, LENGTH, NON_FINITE, RUNNING, STOP, DecodeState
from pixellm_jax.inference.image_cache import ImageCache
from pixellm_jax.inference.mask_decoding import (
    PendingTarget,
    concatenate_targets,
    decode_targets,
    no_targets,
)
from pixellm_jax.inference.request import Completion, EncodedImage, Request, Targets
from pixellm_jax.inference.sampling import Sampling
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.vocabulary import Vocabulary

HEADROOM = 64
"""Number of new tokens for which a row's cache is extended at a time."""

MIN_SUFFIX_BUCKET = 32
"""Smallest bucket of the length of a request's text."""

STREAM_STEPS_PER_SYNC = 4
"""Decode steps between two reads by the host while a request streams."""

MAX_TOKENS_PER_STEP = 256
"""Tokens of all rows that a step on an accelerator feeds in hardly more time than one token.

Up to this number, reading the weights takes longer than computing with them.
"""

MAX_TOKENS_PER_STEP_CPU = 16
"""The same number for a CPU."""

FINISH_REASONS = {STOP: "stop", LENGTH: "length", NON_FINITE: "non_finite", RUNNING: "running"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and batch sizes of an engine."""

    max_batch: int = 16
    """Maximum number of requests that are decoded at the same time."""

    image_cache_size: int = 16
    """Number of encoded images that are kept for further requests."""

    steps_per_sync: int = 32
    """Decode steps between two reads of the results by the host."""

    encode_batch: int = 8
    """Maximum number of images that are encoded in one call."""

    mask_batch: int = 16
    """Maximum number of targets whose masks are decoded in one call."""

    max_new_tokens: int = 512
    """Maximum number of new tokens of an answer."""

    jump_forward: bool = True
    """Complete a codebook group after its first token without sampling (see `decoding.decode`)."""

    max_tokens_per_step: int | None = None
    """Maximum number of tokens of all rows that one step feeds to the language model.

    If the groups of all rows fit, a group costs one step, else one step per token. None: as the
    backend is (`MAX_TOKENS_PER_STEP`).
    """


@dataclass
class _Slot:
    """The host's record of a row: its request, its targets so far and its lengths in positions."""

    request_id: int
    request: Request
    image: EncodedImage
    prompt_length: int
    max_length: int
    """Positions of the prompt and the longest possible answer."""
    targets: Targets
    num_generated: int = 0


class Engine:
    """Answers requests in batches. An engine belongs to one thread; `service.Service` shares it.

    Example:
        >>> engine = Engine(prepare_for_inference(model), vocabulary)
        >>> for number, completion in engine.generate(requests):
        ...     print(number, completion.finish_reason)

    Attributes:
        num_steps: forward passes through the language model so far.
        counter: compilations so far.
    """

    def __init__(
        self,
        model: PixelLM,
        vocabulary: Vocabulary,
        config: EngineConfig = EngineConfig(),
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Create an engine.

        Args:
            model: a model from `prepare_for_inference`.
            vocabulary: its vocabulary.
            config: limits and batch sizes.
            mesh: mesh over which the model's weights are sharded.
        """
        self.model = model
        self.vocabulary = vocabulary
        self.config = config
        self.mesh = mesh
        self.num_steps = 0
        self.counter = CompileCounter()
        self._images = ImageCache(
            model, self.counter, capacity=config.image_cache_size, batch_size=config.encode_batch
        )
        group = vocabulary.group if config.jump_forward else ()
        self._ids: dict[str, Any] = {"stop": vocabulary.eos, "group": group}
        self._max_width = max(len(group), 1)
        on_cpu = jax.default_backend() == "cpu"
        default = MAX_TOKENS_PER_STEP_CPU if on_cpu else MAX_TOKENS_PER_STEP
        limit = config.max_tokens_per_step
        self._max_tokens_per_step = default if limit is None else limit
        self._request_ids = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._state: DecodeState | None = None
        self._slots: list[_Slot | None] = []

    # Requests

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield the index and the completion of every request, in the order in which they finish.

        Requests are taken from the iterable as rows become free.
        """
        indices: dict[int, int] = {}
        remaining = enumerate(requests)
        while True:
            missing = 2 * self.config.max_batch - len(self._waiting)
            for index, request in itertools.islice(remaining, max(missing, 0)):
                indices[self.add_request(request)] = index
            if self.idle:
                return
            for request_id, completion in self.step():
                if request_id in indices:
                    yield indices[request_id], completion

    def add_request(self, request: Request) -> int:
        """Append a request to the queue and return the id under which `step` completes it.

        Raises:
            ValueError: the model has too few positions for the prompt and one token.
        """
        if (length := request.prompt_length) >= self._max_positions:
            raise ValueError(f"a prompt of {length} tokens; the model has {self._max_positions}")
        request_id = next(self._request_ids)
        self._waiting.append((request_id, request))
        return request_id

    def abort(self, request_id: int) -> None:
        """Drop a request, whether it is waiting or running, and free its row."""
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        for row, slot in self._running():
            if slot.request_id == request_id and self._state is not None:
                self._slots[row] = None
                status = self._state.status.at[row].set(FREE)
                self._state = self._state._replace(status=status)

    def reset(self) -> None:
        """Drop all requests, and the cached images, which may be the cause of an error."""
        self._waiting.clear()
        self._images.clear()
        self._state = None
        self._slots = []

    @property
    def num_free(self) -> int:
        """Number of rows that neither run nor are taken by a waiting request."""
        return self.config.max_batch - len(self._running()) - len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self._waiting and not self._running()

    def step(self) -> list[tuple[int, Completion]]:
        """Admit requests, run some decode steps, and return completions by request id.

        Completions are final, or partial ones of requests that stream.
        """
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if not self._running():  # one request must not pay for the rows of an earlier batch
                self._state = None
                self._slots = []
            self._admit()
            if not self._running():
                return []
            self._fit()
            streams = any(slot.request.stream for _, slot in self._running())
            max_steps = STREAM_STEPS_PER_SYNC if streams else self.config.steps_per_sync
            num_tokens = len(self._slots) * self._max_width
            self._state, num_steps = self.counter.call(
                decoding.decode,
                self.model.language_model,
                self._state,
                np.int32(max_steps),
                np.int32(self._min_running()),
                **self._ids,
                group_in_one_step=num_tokens <= self._max_tokens_per_step,
            )
            self.num_steps += int(num_steps)
            return self._collect()

    # Admission

    def _admit(self) -> None:
        """Move waiting requests into free rows; requests of equal shape are prefilled together."""
        num_free = self.config.max_batch - len(self._running())
        admitted = [self._waiting.popleft() for _ in range(min(num_free, len(self._waiting)))]
        images = self._images.encode([request for _, request in admitted])
        by_shape: dict[tuple[int, int], list[_Slot]] = {}
        for (request_id, request), image in zip(admitted, images, strict=True):
            length = request.prompt_length
            limit = self.config.max_new_tokens
            if request.max_new_tokens is not None:
                limit = min(request.max_new_tokens, limit)
            max_length = min(length + limit, self._max_positions)
            slot = _Slot(request_id, request, image, length, max_length, no_targets(self.model))
            suffix_bucket = bucket(len(request.suffix), MIN_SUFFIX_BUCKET, 2)
            shape = image.prefix.valid.shape[1], suffix_bucket
            by_shape.setdefault(shape, []).append(slot)
        for (_, suffix_bucket), slots in by_shape.items():
            self._place(slots, self._prefill(slots, suffix_bucket))

    def _prefill(self, slots: list[_Slot], length: int) -> DecodeState:
        """Prefill the requests' text, padded to `length`, in a bucket of 1, 4, 16, ... rows."""
        padded = slots + slots[-1:] * (self._bucket(len(slots)) - len(slots))
        requests = [slot.request for slot in padded]
        tokens = np.zeros((len(padded), length), np.int32)
        lengths = np.ones(len(padded), np.int32)
        for row, request in enumerate(requests):
            lengths[row] = len(request.suffix)
            tokens[row, : lengths[row]] = request.suffix
        self.num_steps += 1
        return self.counter.call(
            decoding.prefill,
            self.model.language_model,
            tuple(slot.image.prefix for slot in padded),
            tokens,
            lengths,
            np.asarray([slot.max_length - slot.prompt_length for slot in padded], np.int32),
            Sampling(
                np.asarray([int(request.seed) % 2**32 for request in requests], np.uint32),
                np.asarray([request.temperature for request in requests], np.float32),
                np.asarray([request.top_p for request in requests], np.float32),
            ),
            token_capacity=bucket(self.config.max_new_tokens, HEADROOM, 2),
        )

    def _place(self, slots: Sequence[_Slot], new: DecodeState) -> None:
        """Insert new rows into the batch, which grows if necessary."""
        running = [row for row, _ in self._running()]
        size = max(self._bucket(len(running) + len(slots)), len(self._slots))
        if self._state is None:
            self._slots = [*slots, *[None] * (size - len(slots))]
            self._resize(new, range(len(slots)))
            return
        if size > len(self._slots) or self._capacity(slots) > self._state.valid.shape[1]:
            old_size = len(self._slots)
            self._slots += [None] * (size - old_size)
            self._resize(self._state, range(old_size), slots)
        free = [row for row, slot in enumerate(self._slots) if slot is None]
        indices = np.full(new.status.shape, len(self._slots), np.int32)  # padding is dropped
        indices[: len(slots)] = free[: len(slots)]
        for row, slot in zip(free, slots, strict=False):
            self._slots[row] = slot
        self._state = self.counter.call(decoding.insert, self._state, new, indices)

    # The batch on the device

    @property
    def _max_positions(self) -> int:
        return self.model.config.language.max_positions

    def _running(self) -> list[tuple[int, _Slot]]:
        return [(row, slot) for row, slot in enumerate(self._slots) if slot is not None]

    def _bucket(self, count: int) -> int:
        return min(bucket(count), self.config.max_batch)

    def _min_running(self) -> int:
        """Number of running rows below which a request can be admitted, or the batch can shrink."""
        if self._waiting:
            return len(self._running())
        return next(n for n in itertools.count(1) if self._bucket(n) >= len(self._slots))

    def _capacity(self, slots: Iterable[_Slot]) -> int:
        """Return the cache capacity that these rows need for their next `HEADROOM` tokens."""
        ends = [
            min(slot.max_length, slot.prompt_length + slot.num_generated + HEADROOM)
            for slot in slots
        ]
        return round_capacity(max(ends, default=0) + self._max_width)

    def _fit(self) -> None:
        """Extend the cache where a row has no position left; drop rows where fewer are enough."""
        running = self._running()
        assert self._state is not None
        size = self._bucket(len(running) + len(self._waiting))
        end = max(slot.prompt_length + slot.num_generated for _, slot in running) + self._max_width
        if size < len(self._slots):
            self._slots = [slot for _, slot in running] + [None] * (size - len(running))
            self._resize(self._state, [row for row, _ in running])
        elif end > self._state.valid.shape[1]:
            self._resize(self._state, range(len(self._slots)))

    def _resize(
        self, state: DecodeState, rows: Sequence[int], admitted: Sequence[_Slot] = ()
    ) -> None:
        """Gather `rows` at the front of a batch for `self._slots` and the `admitted` ones."""
        indices = np.full(len(self._slots), state.status.shape[0], np.int32)
        indices[: len(rows)] = rows
        capacity = self._capacity([*(slot for _, slot in self._running()), *admitted])
        self._state = self.counter.call(decoding.resize, state, indices, capacity=capacity)

    # Completions

    def _collect(self) -> list[tuple[int, Completion]]:
        """Return completions of finished rows, which become free, and updates of streams."""
        state = self._state
        assert state is not None
        status, num_generated, num_cached, num_steps = jax.device_get(
            (state.status, state.num_generated, state.num_cached, state.num_steps)
        )
        updated: dict[int, _Slot] = {}
        for row, slot in self._running():
            has_news = slot.request.stream and num_generated[row] > slot.num_generated
            if status[row] != RUNNING or has_news:
                updated[row] = slot
            slot.num_generated = int(num_generated[row])
        if not updated:
            return []
        tokens, token_prob = jax.device_get((state.tokens, state.token_prob))
        self._decode_new_targets(updated, tokens, np.minimum(num_generated, num_cached + 1))
        completions = []
        for row, slot in updated.items():
            finished = status[row] != RUNNING
            context = None
            if finished and slot.request.keep_context:
                capacity = round_capacity(slot.prompt_length + int(num_cached[row]))
                prefix = self.counter.call(
                    decoding.extract_prefix, state, np.int32(row), capacity=capacity
                )
                context = EncodedImage(prefix, slot.image.maps)
            completion = Completion(
                tokens=tokens[row, : slot.num_generated],
                token_prob=token_prob[row, : slot.num_generated],
                targets=slot.targets,
                finish_reason=FINISH_REASONS[int(status[row])],
                num_steps=int(num_steps[row]),
                context=context,
            )
            completions.append((slot.request_id, completion))
            if finished:
                self._slots[row] = None
        return completions

    def _decode_new_targets(
        self,
        updated: dict[int, _Slot],
        tokens: Int32[np.ndarray, "b t"],
        num_states: Int32[np.ndarray, "b"],
    ) -> None:
        """Decode the masks of groups that became complete.

        `num_states` is the number of each row's tokens whose hidden states are known.
        """
        assert self._state is not None
        pending = [
            PendingTarget(row, index, slot.image.maps)
            for row, slot in updated.items()
            for index in self.vocabulary.find_groups(tokens[row, : num_states[row]])[
                len(slot.targets.codebook_index) :
            ]
        ]
        decoded = decode_targets(
            self.model,
            self.counter,
            self._state.states,
            pending,
            batch_size=self.config.mask_batch,
        )
        for row, targets in decoded.items():
            updated[row].targets = concatenate_targets([updated[row].targets, targets])
