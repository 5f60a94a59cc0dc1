"""Thread-safe front of an engine: any thread submits requests, one thread runs the engine.

The engine thread exists only while there is work. Completions are turned into results (text, masks)
in one post-processing thread, so that the engine never waits for it. An error of the engine is
raised where the affected requests are waited for; later requests find a working engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pixellm_jax.inference.engine import Engine
from pixellm_jax.inference.request import Completion, Request

Finish = Callable[[Completion], Any]
"""Turns the final completion of a request into the result of its future."""

_Outcome = Completion | BaseException


@dataclass(frozen=True, eq=False)
class _Job:
    """A submitted request.

    Attributes:
        request: the request.
        deliver: called with each completion, or with the error, in the engine thread.
        token: object that identifies the job to `Service.abort`.
    """

    request: Request
    deliver: Callable[[_Outcome], None]
    token: object


def unchanged(completion: Completion) -> Completion:
    """Return the completion itself: the default `finish` function."""
    return completion


class Service:
    """Runs the requests of any number of threads through one engine, first come, first served.

    Example:
        >>> service = Service(engine)
        >>> future = service.submit(request, finish=lambda completion: completion.tokens)
        >>> tokens = future.result()

    Cancelling a future aborts its request, whether it is queued or running, and frees its row.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256) -> None:
        """Create a service whose queue holds `max_queue` requests; a further `submit` blocks."""
        self.engine = engine
        self._inbox: queue.Queue[_Job] = queue.Queue(max_queue)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._post_processing = ThreadPoolExecutor(1, "pixellm post-processing")
        self._running: dict[int, _Job] = {}
        self._live: set[object] = set()
        self._aborted: set[object] = set()

    def submit(
        self, request: Request, finish: Finish = unchanged, *, timeout: float | None = None
    ) -> Future[Any]:
        """Queue a request; its future resolves to `finish(completion)`.

        `finish` runs in the post-processing thread. Blocks for up to `timeout` seconds while the
        queue is full.

        Raises:
            queue.Full: no place in the queue became free in time.
        """
        future, job = self._make_job(request, finish)
        self._put([job], timeout)
        return future

    def submit_all(self, requests: Sequence[tuple[Request, Finish]]) -> list[Future[Any]]:
        """Queue several requests; if the engine is idle, they start together, as one batch.

        Blocks while the queue does not hold all of them.
        """
        made = [self._make_job(request, finish) for request, finish in requests]
        self._put([job for _, job in made], None)
        return [future for future, _ in made]

    def stream(self, request: Request) -> Iterator[Completion]:
        """Yield partial completions and then the final one; closing the iterator aborts."""
        outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._put([_Job(request._replace(stream=True), outcomes.put, outcomes)], None)
        finished = False
        try:
            while not finished:
                outcome = outcomes.get()
                if isinstance(outcome, BaseException):
                    finished = True
                    raise outcome
                finished = outcome.finished
                yield outcome
        finally:
            if not finished:
                self.abort(outcomes)

    def abort(self, token: object) -> None:
        """Abort the request of a future or stream: nothing more is delivered."""
        with self._lock:
            if token in self._live:
                self._aborted.add(token)

    def _make_job(self, request: Request, finish: Finish) -> tuple[Future[Any], _Job]:
        future = Future[Any]()

        def deliver(outcome: _Outcome) -> None:
            if isinstance(outcome, Completion) and not outcome.finished:
                return
            try:
                self._post_processing.submit(_resolve, future, finish, outcome)
            except RuntimeError:  # the main thread has ended while others still run
                _resolve(future, finish, outcome)

        def abort_if_cancelled(future: Future[Any]) -> None:
            if future.cancelled():
                self.abort(future)

        future.add_done_callback(abort_if_cancelled)
        return future, _Job(request, deliver, future)

    def _put(self, jobs: Sequence[_Job], timeout: float | None) -> None:
        """Queue jobs, then start the engine thread; start it earlier if the queue is full."""
        try:
            for job in jobs:
                self._live.add(job.token)
                try:
                    self._inbox.put_nowait(job)
                except queue.Full:
                    self._start()
                    try:
                        self._inbox.put(job, timeout=timeout)
                    except BaseException:
                        self._live.discard(job.token)
                        raise
        finally:
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._inbox.empty():
                self._thread = threading.Thread(target=self._run, name="pixellm engine")
                try:
                    self._thread.start()
                except RuntimeError:  # no thread available; the next submission tries again
                    self._thread = None
                    raise

    def _run(self) -> None:
        """Run the engine until there is no more work."""
        while True:
            with self._lock:
                if self._inbox.empty() and self.engine.idle:
                    self._thread = None
                    self._aborted.clear()
                    return
                aborted, self._aborted = self._aborted, set()
            try:
                self._step(aborted)
            except BaseException as error:  # delivered to everyone who waits
                self.engine.reset()
                running, self._running = self._running, {}
                for job in running.values():
                    self._live.discard(job.token)
                    job.deliver(error)

    def _step(self, aborted: set[object]) -> None:
        """Move queued requests into the engine, abort cancelled ones, and run one engine step.

        One request more than there are free rows is moved: a waiting request makes the engine
        return as soon as a row is free.
        """
        while self.engine.num_free >= 0 and not self._inbox.empty():
            job = self._inbox.get_nowait()
            if job.token in aborted:
                self._forget(job.token)
                continue
            try:
                request_id = self.engine.add_request(job.request)
            except Exception as error:  # concerns this request alone
                self._live.discard(job.token)
                job.deliver(error)
                continue
            self._running[request_id] = job
        for request_id, job in list(self._running.items()):
            if job.token in aborted:
                self._forget(job.token)
                self.engine.abort(request_id)
                del self._running[request_id]
        with self._lock:
            self._aborted |= aborted & self._live  # requests that are still queued
        for request_id, completion in self.engine.step():
            job = self._running[request_id]
            if completion.finished:
                self._live.discard(job.token)
                del self._running[request_id]
            job.deliver(completion)

    def _forget(self, token: object) -> None:
        """Remove an aborted job; wake up `concurrent.futures.wait` if it has a future."""
        self._live.discard(token)
        if isinstance(token, Future) and token.cancelled():
            token.set_running_or_notify_cancel()


def wait_for(future: Future[Any]) -> Any:
    """Return the result of a future; cancel its request if waiting is interrupted."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _resolve(future: Future[Any], finish: Finish, outcome: _Outcome) -> None:
    """Set the result of a future, or its error; do nothing if it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        if isinstance(outcome, BaseException):
            raise outcome
        future.set_result(finish(outcome))
    except BaseException as error:  # raised where the result is waited for
        future.set_exception(error)
