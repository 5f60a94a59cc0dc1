"""Records to judge, and a real HTTP server for the OpenAI protocol that fails on request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np

from pixellm_jax.evaluation.record import QuestionRecord
from pixellm_jax.images.rle import encode

HW = (11, 13)


def mask(rows: int) -> dict[str, Any]:
    """Return a mask of the first rows of the image."""
    return encode(np.arange(HW[0])[:, None].repeat(HW[1], 1) < rows)


def record(number: int, **changes: Any) -> QuestionRecord:
    """Return a record with true masks of 26 and 52 pixels, the second named first in the answer.

    The first is found but for 13 pixels, the second completely: IoU 13 / 26 and 52 / 52.
    """
    whole = QuestionRecord(
        id=f"muse/val/{number}/0",
        picture=f"coco/{number}.jpg",
        hw=HW,
        question=f"What is in picture {number}?",
        expected="A red cup [SEG] and a table [SEG].",
        answer="There is a wooden table [SEG] and a green plant [SEG].",
        groups=("few",),
        truth=(mask(2), mask(4)),
        predicted=(mask(4), mask(1)),
        void=None,
        descriptions=("a red cup", "a round wooden table"),
        pairs=((0, 1, 52, 52), (1, 0, 13, 26)),
        reason="stop",
    )
    return whole._replace(**changes)


class Bad(NamedTuple):
    """A deviation of the server from a good reply."""

    status: int = 200
    body: bytes | None = None
    text: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    hang_up: bool = False
    extra: tuple[tuple[str, Any], ...] = ()


class Server:
    """`behave(question number, number of earlier requests)` returns None for a good reply.

    A good reply gives target N of question Q the score (3 Q + N) % 10 + 1.
    """

    def __init__(self, behave: Callable[[int, int], Bad | None] = lambda *_: None) -> None:
        self.behave, self.lock = behave, threading.Lock()
        self.requests_by_question: dict[int, int] = defaultdict(int)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.url, self.concurrent, self.max_concurrent = "", 0, 0


def good_scores(number: int, targets: int) -> list[int]:
    return [(3 * number + target) % 10 + 1 for target in range(1, targets + 1)]


@contextlib.contextmanager
def serve(server: Server) -> Iterator[Server]:
    """Run the server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with server.lock:
                server.concurrent += 1
                server.max_concurrent = max(server.concurrent, server.max_concurrent)
            try:
                self.reply()
            finally:
                with server.lock:
                    server.concurrent -= 1

        def reply(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            said = json.loads(request["messages"][-1]["content"])
            number = int(said["question"].split()[-1].rstrip("?"))
            with server.lock:
                before, server.requests_by_question[number] = (
                    server.requests_by_question[number],
                    server.requests_by_question[number] + 1,
                )
                server.requests.append(request)
                server.keys.append(self.headers["authorization"])
                server.times.append(time.monotonic())
            bad = server.behave(number, before) or Bad()
            time.sleep(bad.delay)
            if bad.hang_up:
                self.close_connection = True
                return
            scores = good_scores(number, len(said["targets"]))
            text = json.dumps({str(n): score for n, score in enumerate(scores, 1)})
            message = {"role": "assistant", "content": text if bad.text is None else bad.text}
            value = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": f"{request['model']}-2026",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            } | dict(bad.extra)
            body = json.dumps(value).encode() if bad.body is None else bad.body
            with contextlib.suppress(ConnectionError):  # the client may have gone
                self.send_response(bad.status)
                for name, content in (*bad.headers, ("content-length", str(len(body)))):
                    self.send_header(name, content)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("localhost", 0), Handler) as listener:
        server.url = f"http://localhost:{listener.server_port}/v1"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
