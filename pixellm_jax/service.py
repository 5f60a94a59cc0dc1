"""An engine for several threads: they put questions in a queue, and one thread runs the engine.

The thread exists as long as there is something to do. An error of the engine is raised where the
questions under way are waited for, and the next question finds an engine that works.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from pixellm_jax.engine import Engine
from pixellm_jax.question import Question, Result

_Deliver = Callable[[Result | BaseException], None]


class Service:
    """Serves questions of any thread, in the order in which they come.

    `waiting`: most questions in the queue; whoever brings one more waits.
    """

    def __init__(self, engine: Engine, *, waiting: int = 256) -> None:
        self.engine = engine
        self._inbox: queue.Queue[tuple[Question, _Deliver, object]] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._under_way: dict[int, tuple[_Deliver, object]] = {}
        self._dropped: set[object] = set()
        self._gathering = 0

    def submit(self, question: Question, *, timeout: float | None = None) -> Future[Result]:
        """The result, later. Waits up to `timeout` seconds for a place in the queue.

        Raises:
            queue.Full: there was none.
        """
        future: Future[Result] = Future()

        def deliver(found: Result | BaseException) -> None:
            if isinstance(found, BaseException):
                future.set_exception(found)
            elif found.reason != "running":
                future.set_result(found)

        self._put(question, deliver, future, timeout)
        return future

    def stream(self, question: Question) -> Iterator[Result]:
        """Results as they grow; the last one has ended. Leaving early drops the question."""
        results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._put(question._replace(stream=True), results.put, results, None)
        ended = False
        try:
            while not ended:
                found = results.get()
                if isinstance(found, BaseException):
                    ended = True
                    raise found
                ended = found.reason != "running"
                yield found
        finally:
            if not ended:
                self.drop(results)

    def drop(self, token: object) -> None:
        """Forgets the question of a future (or of a stream): nothing more is delivered."""
        with self._lock:
            if self._thread is not None:
                self._dropped.add(token)

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Questions that are put inside start together, when the block ends.

        No more of them than the queue holds; those that are under way go on.
        """
        with self._lock:
            self._gathering += 1
        try:
            yield
        finally:
            with self._lock:
                self._gathering -= 1
                self._start()

    def _put(
        self, question: Question, deliver: _Deliver, token: object, timeout: float | None
    ) -> None:
        self._inbox.put((question, deliver, token), timeout=timeout)
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._thread is None and not self._gathering and not self._inbox.empty():
            self._thread = threading.Thread(target=self._run, name="pixellm engine")
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._inbox.empty() and self.engine.idle:
                    self._thread = None
                    self._dropped.clear()
                    return
                dropped, self._dropped = self._dropped, set()
            try:
                self._turn(dropped)
            except BaseException as error:  # whoever waits must hear of it
                self.engine.clear()
                under_way, self._under_way = self._under_way, {}
                for deliver, _ in under_way.values():
                    deliver(error)

    def _turn(self, dropped: set[object]) -> None:
        """Takes as many questions as there are free rows, and lets the engine make a step."""
        while self.engine.free > 0 and not self._inbox.empty():
            question, deliver, token = self._inbox.get_nowait()
            if token in dropped:
                dropped.discard(token)
                continue
            if isinstance(token, Future) and not token.set_running_or_notify_cancel():
                continue  # cancelled while it was waiting
            try:
                ticket = self.engine.add(question)
            except ValueError as error:
                deliver(error)
                continue
            self._under_way[ticket] = deliver, token
        for ticket, (_, token) in list(self._under_way.items()):
            if token in dropped:
                dropped.discard(token)
                self.engine.drop(ticket)
                del self._under_way[ticket]
        with self._lock:
            self._dropped |= dropped  # of questions that are still in the queue
        for ticket, result in self.engine.step():
            deliver, _ = self._under_way[ticket]
            if result.reason != "running":
                del self._under_way[ticket]
            deliver(result)
