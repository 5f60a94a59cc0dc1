"""An engine for several threads: they put questions in a queue, and one thread runs the engine.

The thread exists as long as there is something to do. An error of the engine is raised where the
questions under way are waited for, and the next question finds an engine that works.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from pixellm_jax.inference.engine import Engine
from pixellm_jax.inference.request import Question, Result

_Deliver = Callable[[Result | BaseException], None]
_Item = tuple[Question, _Deliver, object]
"""A question, who gets its results, and the token by which it can be dropped."""


class Service:
    """Serves questions of any thread, in the order in which they come.

    `waiting`: most questions in the queue; whoever brings one more waits.
    """

    def __init__(self, engine: Engine, *, waiting: int = 256) -> None:
        self.engine = engine
        self._inbox: queue.Queue[_Item] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._under_way: dict[int, tuple[_Deliver, object]] = {}
        self._live: set[object] = set()
        self._dropped: set[object] = set()

    def submit(self, question: Question, *, timeout: float | None = None) -> Future[Result]:
        """The result, later. Waits up to `timeout` seconds for a place in the queue.

        Raises:
            queue.Full: there was none.
        """
        future, item = _promise(question)
        self._put([item], timeout)
        return future

    def submit_together(self, questions: Sequence[Question]) -> list[Future[Result]]:
        """The results, later. Where nothing is under way, all start at once, as one batch.

        Waits where the queue has no room for all.
        """
        futures, items = [], []
        for question in questions:
            future, item = _promise(question)
            futures.append(future)
            items.append(item)
        self._put(items, None)
        return futures

    def stream(self, question: Question) -> Iterator[Result]:
        """Results as they grow; the last one has ended. Leaving early drops the question."""
        results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._put([(question._replace(stream=True), results.put, results)], None)
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
            if token in self._live:
                self._dropped.add(token)

    def _put(self, items: Sequence[_Item], timeout: float | None) -> None:
        """Queues questions, then starts the thread; before, where the queue is full."""
        try:
            for item in items:
                token = item[2]
                self._live.add(token)
                try:
                    self._inbox.put_nowait(item)
                except queue.Full:
                    self._start()
                    try:
                        self._inbox.put(item, timeout=timeout)
                    except BaseException:
                        self._live.discard(token)
                        raise
        finally:
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._inbox.empty():
                self._thread = threading.Thread(target=self._run, name="pixellm engine")
                try:
                    self._thread.start()
                except RuntimeError:  # no thread can be had; the next question tries again
                    self._thread = None
                    raise

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
                for deliver, token in under_way.values():
                    self._live.discard(token)
                    deliver(error)

    def _turn(self, dropped: set[object]) -> None:
        """Takes questions for the free rows and one more, and lets the engine make a step.

        That one tells the engine to look up as soon as a row is free.
        """
        while self.engine.free >= 0 and not self._inbox.empty():
            question, deliver, token = self._inbox.get_nowait()
            if token in dropped or (
                isinstance(token, Future) and not token.set_running_or_notify_cancel()
            ):
                self._live.discard(token)
                continue
            try:
                ticket = self.engine.add(question)
            except Exception as error:  # of this question alone
                self._live.discard(token)
                deliver(error)
                continue
            self._under_way[ticket] = deliver, token
        for ticket, (_, token) in list(self._under_way.items()):
            if token in dropped:
                self._live.discard(token)
                self.engine.drop(ticket)
                del self._under_way[ticket]
        with self._lock:
            self._dropped |= dropped & self._live  # of questions that are still in the queue
        for ticket, result in self.engine.step():
            deliver, token = self._under_way[ticket]
            if result.reason != "running":
                self._live.discard(token)
                del self._under_way[ticket]
            deliver(result)


def _promise(question: Question) -> tuple[Future[Result], _Item]:
    future: Future[Result] = Future()

    def deliver(found: Result | BaseException) -> None:
        if isinstance(found, BaseException):
            future.set_exception(found)
        elif found.reason != "running":
            future.set_result(found)

    return future, (question, deliver, future)
