"""The engine: questions go in at any time, answers come out as they end.

It holds a batch of rows on the device (`generate.py`), one question each, and does three things in
turn: it puts waiting questions into free rows, runs some passes, and hands out what has ended. So
the batch is full as long as somebody waits. All shapes come from few buckets (1, 4, 16, ... rows,
`round_capacity` of positions), so few programs are ever compiled.
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
from pixellm_jax.inference.compilation import Programs, bucket, round_capacity
from pixellm_jax.inference.decoding import DAMAGED, FREE, LENGTH, RUNNING, STOP, Rows
from pixellm_jax.inference.image_cache import Pictures
from pixellm_jax.inference.mask_decoding import Found, decode_targets, join, no_targets
from pixellm_jax.inference.request import Question, Result, Seen, Targets
from pixellm_jax.inference.sampling import Sampling
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.vocabulary import Vocabulary

AHEAD = 64
"""A row is given room for so many new tokens at a time."""

SHORTEST = 32
"""The least bucket of a question's length."""

STREAM_STEPS = 4
"""Passes between two looks of the host while somebody reads along."""

AT_ONCE, AT_ONCE_ON_CPU = 256, 16
"""Ids of all rows in a pass that take hardly longer than one: reading the weights takes longest."""

REASONS = {STOP: "stop", LENGTH: "length", DAMAGED: "damaged", RUNNING: "running"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much is done at once.

    rows: most questions under way. pictures: how many are kept for further questions.
    steps: passes between two looks of the host. encoded, masks: most pictures encoded, and targets
    decoded, in one call. fast_forward: a codebook token is followed by the rest of its target (see
    `generate.decode`). at_once: most ids of all rows in a pass for which a target costs a single
    pass, else one per id (None: `AT_ONCE`, as the backend is).
    """

    rows: int = 16
    pictures: int = 16
    steps: int = 32
    encoded: int = 8
    masks: int = 16
    max_new_tokens: int = 512
    fast_forward: bool = True
    at_once: int | None = None


@dataclass
class _Slot:
    """What the host knows of a row. `limit`: positions of the prompt and the longest answer."""

    ticket: int
    question: Question
    seen: Seen
    prompt: int
    limit: int
    targets: Targets
    count: int = 0


class Engine:
    """Answers questions in batches. For one thread (several: `service`)."""

    def __init__(
        self,
        model: PixelLM,
        vocabulary: Vocabulary,
        config: EngineConfig = EngineConfig(),
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """`model`: as `serving.serve` gives it. `mesh`: over which its weights are spread."""
        self.model, self.vocabulary, self.config, self.mesh = model, vocabulary, config, mesh
        self.passes = 0
        self.programs = Programs()
        self._pictures = Pictures(
            model, self.programs, limit=config.pictures, together=config.encoded
        )
        group = vocabulary.group if config.fast_forward else ()
        self._ends: dict[str, Any] = {"stop": vocabulary.eos, "group": group}
        self._width = max(len(group), 1)
        usual = AT_ONCE_ON_CPU if jax.default_backend() == "cpu" else AT_ONCE
        self._at_once = usual if config.at_once is None else config.at_once
        self._tickets = itertools.count()
        self._waiting: deque[tuple[int, Question]] = deque()
        self._rows: Rows | None = None
        self._slots: list[_Slot | None] = []

    # Questions

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Result]]:
        """Answers all; yields the number of a question and its result, in the order they end.

        Questions are taken from the iterable as rows become free.
        """
        numbers: dict[int, int] = {}
        coming = enumerate(questions)
        while True:
            missing = 2 * self.config.rows - len(self._waiting)
            for number, question in itertools.islice(coming, max(missing, 0)):
                numbers[self.add(question)] = number
            if self.idle:
                return
            for ticket, result in self.step():
                if ticket in numbers:
                    yield numbers[ticket], result

    def add(self, question: Question) -> int:
        """Puts a question at the end of the queue. `step` gives its result with this ticket.

        Raises:
            ValueError: the model has too few positions for the prompt and a token.
        """
        if (length := question.length) >= self._positions:
            raise ValueError(f"a prompt of {length} tokens; the model has {self._positions}")
        ticket = next(self._tickets)
        self._waiting.append((ticket, question))
        return ticket

    def drop(self, ticket: int) -> None:
        """Forgets a question, wherever it is."""
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        for number, slot in self._running():
            if slot.ticket == ticket and self._rows is not None:
                self._slots[number] = None
                status = self._rows.status.at[number].set(FREE)
                self._rows = self._rows._replace(status=status)

    def clear(self) -> None:
        """Forgets all questions, and pictures, which may be what went wrong."""
        self._waiting.clear()
        self._pictures.clear()
        self._rows, self._slots = None, []

    @property
    def free(self) -> int:
        """Rows that nothing runs in and nothing waits for."""
        return self.config.rows - len(self._running()) - len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running()

    def step(self) -> list[tuple[int, Result]]:
        """Admits questions, runs some passes, and returns what ended (and what streams said)."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if not self._running():  # a lone question shall not pay for the rows of a former batch
                self._rows, self._slots = None, []
            self._admit()
            if not self._running():
                return []
            self._fit()
            streams = any(slot.question.stream for _, slot in self._running())
            steps = np.int32(STREAM_STEPS if streams else self.config.steps)
            self._rows, passes = self.programs(
                decoding.decode,
                self.model.language_model,
                self._rows,
                steps,
                np.int32(self._enough()),
                **self._ends,
                together=len(self._slots) * self._width <= self._at_once,
            )
            self.passes += int(passes)
            return self._collect()

    # Admission

    def _admit(self) -> None:
        """Gives free rows to waiting questions; those of one shape are read together."""
        free = self.config.rows - len(self._running())
        chosen = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        pictures = self._pictures.read([question for _, question in chosen])
        kinds: dict[tuple[int, int], list[_Slot]] = {}
        for (ticket, question), seen in zip(chosen, pictures, strict=True):
            prompt = question.length
            most = self.config.max_new_tokens
            budget = most if question.budget is None else min(question.budget, most)
            limit = min(prompt + budget, self._positions)
            slot = _Slot(ticket, question, seen, prompt, limit, no_targets(self.model))
            shape = seen.prefix.valid.shape[1], bucket(len(question.own), SHORTEST, 2)
            kinds.setdefault(shape, []).append(slot)
        for (_, length), slots in kinds.items():
            self._place(slots, self._prefill(slots, length))

    def _prefill(self, slots: list[_Slot], length: int) -> Rows:
        """Reads the questions' own text, padded to `length`, in a bucket of 1, 4, 16, ... rows."""
        padded = slots + slots[-1:] * (self._bucket(len(slots)) - len(slots))
        questions = [slot.question for slot in padded]
        tokens, lengths = np.zeros((len(padded), length), np.int32), np.ones(len(padded), np.int32)
        for i, question in enumerate(questions):
            lengths[i] = len(question.own)
            tokens[i, : lengths[i]] = question.own
        self.passes += 1
        return self.programs(
            decoding.prefill,
            self.model.language_model,
            tuple(slot.seen.prefix for slot in padded),
            tokens,
            lengths,
            np.asarray([slot.limit - slot.prompt for slot in padded], np.int32),
            Sampling(
                np.asarray([int(question.seed) % 2**32 for question in questions], np.uint32),
                np.asarray([question.temperature for question in questions], np.float32),
                np.asarray([question.top_p for question in questions], np.float32),
            ),
            room=bucket(self.config.max_new_tokens, AHEAD, 2),
        )

    def _place(self, slots: Sequence[_Slot], fresh: Rows) -> None:
        """Puts fresh rows into the batch, which grows if it must."""
        running = [number for number, _ in self._running()]
        size = max(self._bucket(len(running) + len(slots)), len(self._slots))
        if self._rows is None:
            self._slots = [*slots, *[None] * (size - len(slots))]
            self._resize(fresh, range(len(slots)))
            return
        if size > len(self._slots) or self._needed(slots) > self._rows.valid.shape[1]:
            before = len(self._slots)
            self._slots += [None] * (size - before)
            self._resize(self._rows, range(before), slots)
        free = [number for number, slot in enumerate(self._slots) if slot is None]
        places = np.full(fresh.status.shape, len(self._slots), np.int32)  # padding goes nowhere
        places[: len(slots)] = free[: len(slots)]
        for number, slot in zip(free, slots, strict=False):
            self._slots[number] = slot
        self._rows = self.programs(decoding.insert, self._rows, fresh, places)

    # The batch on the device

    @property
    def _positions(self) -> int:
        return self.model.config.language.max_positions

    def _running(self) -> list[tuple[int, _Slot]]:
        return [(number, slot) for number, slot in enumerate(self._slots) if slot is not None]

    def _bucket(self, count: int) -> int:
        return min(bucket(count), self.config.rows)

    def _enough(self) -> int:
        """Rows that must run: with one less, a place is free for who waits, or fewer rows do."""
        if self._waiting:
            return len(self._running())
        return next(n for n in itertools.count(1) if self._bucket(n) >= len(self._slots))

    def _needed(self, slots: Iterable[_Slot]) -> int:
        """Capacity for all that these rows may need for some time."""
        ends = [min(slot.limit, slot.prompt + slot.count + AHEAD) for slot in slots]
        return round_capacity(max(ends, default=0) + self._width)

    def _fit(self) -> None:
        """Gives more positions where a row has none left, and fewer rows where fewer will do."""
        running = self._running()
        assert self._rows is not None
        size = self._bucket(len(running) + len(self._waiting))
        end = max(slot.prompt + slot.count for _, slot in running) + self._width
        if size < len(self._slots):
            self._slots = [slot for _, slot in running] + [None] * (size - len(running))
            self._resize(self._rows, [number for number, _ in running])
        elif end > self._rows.valid.shape[1]:
            self._resize(self._rows, range(len(self._slots)))

    def _resize(self, rows: Rows, kept: Sequence[int], more: Sequence[_Slot] = ()) -> None:
        """Brings the rows number `kept` to the front of a batch for `self._slots`."""
        numbers = np.full(len(self._slots), rows.status.shape[0], np.int32)
        numbers[: len(kept)] = kept
        needed = self._needed([*(slot for _, slot in self._running()), *more])
        self._rows = self.programs(decoding.resize, rows, numbers, capacity=needed)

    # Results

    def _collect(self) -> list[tuple[int, Result]]:
        """Results of the rows that ended, which become free, and news of streams."""
        rows = self._rows
        assert rows is not None
        status, count, fed, passes = jax.device_get((rows.status, rows.said, rows.fed, rows.passes))
        told: dict[int, _Slot] = {}
        for number, slot in self._running():
            if status[number] != RUNNING or (slot.question.stream and count[number] > slot.count):
                told[number] = slot
            slot.count = int(count[number])
        if not told:
            return []
        tokens, chance = jax.device_get((rows.tokens, rows.chance))
        self._find_targets(told, tokens, np.minimum(count, fed + 1))
        results = []
        for number, slot in told.items():
            ended, seen = status[number] != RUNNING, None
            if ended and slot.question.keep:
                length = round_capacity(slot.prompt + int(fed[number]))
                prefix = self.programs(decoding.keep, rows, np.int32(number), capacity=length)
                seen = Seen(prefix, slot.seen.maps)
            result = Result(
                tokens=tokens[number, : slot.count],
                chance=chance[number, : slot.count],
                targets=slot.targets,
                reason=REASONS[int(status[number])],
                passes=int(passes[number]),
                seen=seen,
            )
            results.append((slot.ticket, result))
            if ended:
                self._slots[number] = None
        return results

    def _find_targets(
        self,
        told: dict[int, _Slot],
        tokens: Int32[np.ndarray, "b t"],
        known: Int32[np.ndarray, "b"],
    ) -> None:
        """Decodes the groups that became complete; `known`: how many tokens have their state."""
        assert self._rows is not None
        found = [
            Found(number, index, slot.seen.maps)
            for number, slot in told.items()
            for index in self.vocabulary.find_groups(tokens[number, : known[number]])[
                len(slot.targets.codebook_index) :
            ]
        ]
        decoded = decode_targets(
            self.model, self.programs, self._rows.states, found, together=self.config.masks
        )
        for number, targets in decoded.items():
            told[number].targets = join([told[number].targets, targets])
