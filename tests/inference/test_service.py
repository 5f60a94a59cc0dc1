"""Service: a bounded queue, a thread only while there is work, recovery after errors."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from pixellm_jax.images.geometry import fit
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.request import Request
from pixellm_jax.inference.service import Service, unchanged
from pixellm_jax.text.prompt import TEMPLATES, question_ids

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def engine(predictor) -> Engine:
    return Engine(
        predictor.model, predictor.vocabulary, EngineConfig(max_batch=4, max_new_tokens=12)
    )


@pytest.fixture
def service(engine) -> Service:
    return Service(engine, max_queue=3)


@pytest.fixture(scope="module")
def question(predictor) -> Request:
    config = predictor.config
    tokens = question_ids(
        predictor.vocabulary, TEMPLATES[config.template], "Hm?", image_tokens=config.image_tokens
    )
    return Request(tokens, *fit(np.full((30, 20, 3), 99, np.uint8), config.vision.canvas))


@contextlib.contextmanager
def held(service: Service):
    """Start the requests that are submitted in the block when the block ends."""
    service._start = lambda: None
    try:
        yield
    finally:
        del service._start
        service._start()


def wait_for_rest(service: Service) -> None:
    """Wait until the engine thread has ended."""
    for _ in range(2000):
        if service._thread is None:
            return
        time.sleep(0.01)
    raise AssertionError("the thread is still there")


def test_the_thread_exists_only_while_there_is_work(service, question):
    assert service._thread is None
    assert service.submit(question).result().finish_reason == "stop"
    wait_for_rest(service)
    assert service.submit(question).result().finish_reason == "stop"  # and comes back
    wait_for_rest(service)
    assert not [thread for thread in threading.enumerate() if thread.name == "pixellm engine"]


def test_the_queue_is_bounded(service, question):
    with held(service):
        futures = [service.submit(question) for _ in range(3)]
        with pytest.raises(queue.Full):
            service.submit(question, timeout=0.01)
        assert service._thread is None and not any(future.done() for future in futures)
    assert [future.result().finish_reason for future in futures] == ["stop"] * 3


def test_requests_submitted_together_are_prefilled_together(service, engine, question):
    results = [future.result() for future in service.submit_all([(question, unchanged)] * 3)]
    wait_for_rest(service)
    assert engine.num_steps == 1 + results[0].num_steps - 1


def test_more_requests_than_the_queue_holds_can_be_submitted(service, question):
    found = []

    def submit() -> None:
        found.extend(
            future.result().finish_reason
            for future in service.submit_all([(question, unchanged)] * 9)
        )

    threads = [threading.Thread(target=submit, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == ["stop"] * 27


def test_a_waiting_request_takes_the_row_of_a_finished_one(predictor, question):
    """The number of steps equals that of an engine that knows all requests from the start."""
    config = EngineConfig(max_batch=2, max_new_tokens=12)
    questions = [question._replace(max_new_tokens=1 + 5 * i % 7) for i in range(16)]
    engines = [Engine(predictor.model, predictor.vocabulary, config) for _ in range(2)]
    whole = dict(engines[0].generate(questions))
    futures = Service(engines[1]).submit_all([(each, unchanged) for each in questions])
    for number, future in enumerate(futures):
        np.testing.assert_array_equal(future.result().tokens, whole[number].tokens)
    assert engines[1].num_steps == engines[0].num_steps


def test_a_failed_thread_start_is_retried(service, question, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            service.submit(question)
    assert service.submit(question).result(timeout=60).finish_reason == "stop"
    wait_for_rest(service)


def test_an_engine_error_reaches_current_requests_only(service, engine, question, monkeypatch):
    def fail():
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", fail)
        with held(service):
            futures = [service.submit(question) for _ in range(2)]
            stream = service.stream(question)
        for future in futures:
            with pytest.raises(MemoryError, match="no room"):
                future.result()
        with pytest.raises(MemoryError, match="no room"):
            list(stream)
        wait_for_rest(service)
    assert service.submit(question).result().finish_reason == "stop"


def test_a_request_that_does_not_fit_fails_alone(service, engine, question):
    limit = engine.model.config.language.max_positions
    long = question._replace(tokens=np.concatenate([question.tokens, np.full(limit, 5, np.int32)]))
    with held(service):
        good, bad, other = (service.submit(asked) for asked in (question, long, question))
    assert good.result().finish_reason == other.result().finish_reason == "stop"
    with pytest.raises(ValueError, match=f"the model has {limit}"):
        bad.result()


def test_a_queued_request_can_be_cancelled(service, engine, question):
    with held(service):
        futures = [service.submit(question) for _ in range(3)]
        assert futures[1].cancel()
    assert futures[0].result().finish_reason == futures[2].result().finish_reason == "stop"
    with pytest.raises(CancelledError):
        futures[1].result()
    wait_for_rest(service)


def test_closing_a_stream_frees_its_row(service, engine, question, monkeypatch):
    dropped = []
    abort = engine.abort
    monkeypatch.setattr(engine, "abort", lambda ticket: (dropped.append(ticket), abort(ticket)))
    monkeypatch.setattr("pixellm_jax.inference.engine.STREAM_STEPS_PER_SYNC", 1)
    stream = service.stream(question)
    assert next(stream).finish_reason == "running"
    stream.close()
    wait_for_rest(service)
    assert engine.idle
    assert dropped == [0]
    service.abort(stream)  # of no question any more
    assert not service._aborted and not service._live
    assert [result.finish_reason for result in service.stream(question)][-1] == "stop"
