"""A judge behind any server that implements the OpenAI protocol for chat completions.

Failed requests are retried by the `openai` client with its exponential backoff. Added here are a
pause that all threads share after a rate limit, retries of replies that cannot be parsed, counts of
every request, and a cache of replies on disk.
"""

from __future__ import annotations

import email.utils
import hashlib
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.prompt import (
    PROMPT_VERSION,
    JudgeDownError,
    JudgeQuestion,
    NotJudgedError,
    Reply,
    make_request,
    read_reply,
    read_scores,
)
from pixellm_jax.files import write_whole

KEY = "OPENAI_API_KEY"
"""Environment variable with the API key. The key is sent to the server and written nowhere."""

_MIN_KEY_LENGTH = 8
"""A shorter key is no secret but the placeholder of a local server, which may occur in text."""

_QUOTA = "insufficient_quota"
"""Error code of a 429 that no pause resolves."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Address of the judge's server and how it is queried."""

    url: str
    """Base URL of the API, such as `http://localhost:8000/v1`."""
    model: str
    """Model that judges."""
    temperature: float | None = 0.0
    """Sampling temperature; None for the server's default (some models accept no other)."""
    timeout: float = 60.0
    """Seconds until the reply begins, and between its parts."""
    max_attempts: int = 5
    """Attempts per question while requests fail or replies cannot be parsed."""
    max_rate_limits: int = 30
    """Rate limits in a row (status 429) after which a question fails."""
    initial_pause: float = 1.0
    """Seconds after the first rate limit or unparsable reply; doubled after each further one."""
    max_pause: float = 30.0
    """Upper bound of the doubled pause in seconds."""
    max_retry_after: float = 120.0
    """A server that requests a longer pause in seconds ends the run."""
    workers: int = 8
    """Concurrent requests."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
            valid = valid and parts.port != 0 and parts.username is None and not parts.query
        except ValueError:
            valid = False
        if not valid:
            raise InputError(
                "the judge's URL is not http(s)://HOST[:PORT]/PATH without user name, password and "
                f"query; put the key into the environment variable {KEY}"
            )
        if not self.model:
            raise InputError("the judge's model has no name")
        if min(self.workers, self.max_attempts, self.max_rate_limits) < 1 or not self.timeout > 0:
            raise InputError(
                "the judge needs at least one worker, one attempt and a positive timeout"
            )


class ServerJudge:
    """Language-model judge on a server; its methods may be called from several threads.

        judge = ServerJudge(ServerConfig(url="http://localhost:8000/v1", model="m"), Path("cache"))
        scores = judge.score(make_question(record))

    Args:
        config: the server and how it is queried.
        cache: folder of the replies (`ReplyCache`).

    Raises:
        InputError: the `openai` package is not installed, or the API key is malformed.
    """

    def __init__(self, config: ServerConfig, cache: Path) -> None:
        host = urlsplit(config.url).netloc
        temperature = "its own" if config.temperature is None else f"{config.temperature:g}"
        self.name = f"{config.model} at {host} (prompt {PROMPT_VERSION}, temperature {temperature})"
        self.workers = config.workers
        self._config = config
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise InputError(f"{KEY} is not an API key: it has blanks or non-ASCII characters")
        self._client = _connect(config, self._key or "none", self._send)
        self._cache = ReplyCache(cache, config.url)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._models: set[str] = set()
        self._resume_at = 0.0  # no request before this moment of `time.monotonic`

    def score(self, question: JudgeQuestion) -> list[int]:
        """Return a score from 1 to 10 for each target, cached where the request is the same.

        Raises:
            NotJudgedError: every attempt failed, or the server refuses this question.
            JudgeDownError: the server refuses all questions, or requests a long pause.
        """
        request = make_request(
            question, model=self._config.model, temperature=self._config.temperature
        )
        targets = len(question.descriptions)
        cached = self._cache.get(request)
        if cached is not None:
            try:
                scores = read_scores(cached.text, targets)
            except NotJudgedError:
                pass  # another version accepted this reply
            else:
                self._count(from_cache=1)
                return self._finish(cached, scores)
        reply, scores = self._request(request, targets)
        self._cache.put(request, reply)
        return self._finish(reply, scores)

    def describe(self) -> dict[str, object]:
        """Return the settings for a report; the API key is not among them."""
        config = self._config
        return {
            "kind": "server",
            "url": config.url,
            "model": config.model,
            "served": sorted(self._models),
            "temperature": config.temperature,
            "prompt": PROMPT_VERSION,
        }

    def counts(self) -> Mapping[str, int]:
        """Return the non-zero counts of requests, replies and tokens.

        requests: requests sent. from_cache: questions scored without a request.
        retries: requests repeated after a failure, rate limits not included.
        rate_limited, timeouts, server_errors, no_connection, malformed, refused: failures by kind.
        tokens_in, tokens_out: tokens of this run's requests, malformed replies included.
        scored_tokens_in, scored_tokens_out: tokens behind all scores, cached replies included.
        without_tokens: replies that do not report their tokens.
        """
        with self._lock:
            return {name: count for name, count in sorted(self._counts.items()) if count}

    def _request(self, request: dict[str, Any], targets: int) -> tuple[Reply, list[int]]:
        """Request scores until a reply can be parsed; the `openai` client retries failures."""
        attempts = 0
        while True:
            attempts += 1
            client = self._client.with_options(max_retries=self._config.max_attempts - attempts)
            raw = self._create(client, request)
            attempts += raw.retries_taken
            try:
                reply = read_reply(self._hide_key(raw.http_response.text).encode())
                tokens_in, tokens_out = reply.tokens or (0, 0)
                self._count(
                    tokens_in=tokens_in,
                    tokens_out=tokens_out,
                    without_tokens=reply.tokens is None,
                )
                return reply, read_scores(reply.text, targets)
            except NotJudgedError:
                self._count(malformed=1)
                if attempts >= self._config.max_attempts:
                    raise
            self._count(retries=1)
            time.sleep(self._pause(attempts))

    def _create(self, client: Any, request: dict[str, Any]) -> Any:
        """Send a request with the client's retries and return the raw response."""
        import openai

        try:
            return client.chat.completions.with_raw_response.create(**request)
        except openai.APITimeoutError:
            raise NotJudgedError(f"no reply in {self._config.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.APIConnectionError as error:
            raise NotJudgedError(
                self._one_line(f"no connection ({error.__cause__ or error})")
            ) from None

    def _send(self, request: Any, send: Callable[[], Any]) -> Any:
        """Send one attempt of the client; repeat it after the shared pause while rate-limited.

        A rate limit that no pause resolves is returned with the header that stops the client's
        retries.
        """
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            self._count(retries=1)
        for limits in itertools.count(1):
            self._wait()
            self._count(requests=1)
            try:
                response = send()
            except Exception as error:
                # The HTTP library is the client's choice: its exceptions are known by name only.
                timed_out = type(error).__name__.endswith("Timeout")
                self._count(**{"timeouts" if timed_out else "no_connection": 1})
                raise
            if response.status_code >= 500 or response.status_code in (408, 409):
                self._count(server_errors=1)
            if response.status_code != 429:
                return response
            self._count(rate_limited=1)
            seconds = _retry_after(response.headers)
            hopeless = _QUOTA in response.text or seconds > self._config.max_retry_after
            if hopeless or limits == self._config.max_rate_limits:
                response.headers["x-should-retry"] = "false"
                return response
            self._pause_all(max(seconds, self._pause(limits)))

    def _status_error(self, error: Any) -> Exception:
        """Translate an HTTP status into a failure of this question or of the judge."""
        status = error.status_code
        message = self._one_line(f"the server answers {status}: {error.message}")
        if status == 429:
            seconds = _retry_after(error.response.headers)
            if _QUOTA in error.response.text:
                return JudgeDownError(f"{message}; the quota of the account is used up")
            if seconds > self._config.max_retry_after:
                return JudgeDownError(
                    f"the server requests a pause of {seconds:.0f} s; run the command again later"
                )
            return NotJudgedError(f"rate limit, {self._config.max_rate_limits} times in a row")
        if status in (401, 403, 404):
            return JudgeDownError(f"{message}; check --judge-url, --judge-model and {KEY}")
        if status < 500 and status not in (408, 409):
            self._count(refused=1)
        return NotJudgedError(message)

    def _wait(self) -> None:
        while (seconds := self._resume_at - time.monotonic()) > 0:
            time.sleep(seconds)

    def _pause(self, number: int) -> float:
        """Seconds of the pause after the `number`-th failure in a row."""
        doubled = self._config.initial_pause * 2 ** min(number - 1, 30)
        # Jitter, so that the workers do not return all at once.
        return min(doubled, self._config.max_pause) * (1 - 0.25 * random.random())

    def _pause_all(self, seconds: float) -> None:
        """Hold back the requests of all threads: a rate limit applies to all of them."""
        with self._lock:
            self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def _finish(self, reply: Reply, scores: list[int]) -> list[int]:
        tokens_in, tokens_out = reply.tokens or (0, 0)
        self._count(scored_tokens_in=tokens_in, scored_tokens_out=tokens_out)
        with self._lock:
            self._models.add(reply.model)
        return scores

    def _count(self, **events: int) -> None:
        with self._lock:
            self._counts.update(events)

    def _one_line(self, text: str) -> str:
        """Shorten a foreign message to one line without the API key."""
        return self._hide_key(" ".join(text.split()))[:300]

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _MIN_KEY_LENGTH else text


class ReplyCache:
    """Replies on disk, one file per request, keyed by the server's URL and the whole request.

    Files are written atomically. A file that is damaged or belongs to another request counts as
    absent and is replaced. Threads and processes may share a folder.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url

    def get(self, request: dict[str, Any]) -> Reply | None:
        """Return the reply to a request, None if there is none."""
        try:
            entry = json.loads(self._path(request).read_bytes())
            if entry["url"] != self._url or entry["request"] != request:
                return None
            text, model, tokens = (entry["reply"][key] for key in Reply._fields)
            valid = tokens is None or [type(count) for count in tokens] == [int, int]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not (isinstance(text, str) and isinstance(model, str) and valid):
            return None
        return Reply(text, model, tokens and (tokens[0], tokens[1]))

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        """Write a reply.

        Raises:
            JudgeDownError: the file cannot be written.
        """
        path = self._path(request)
        entry = {"url": self._url, "request": request, "reply": reply._asdict()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(entry))
        except OSError as error:
            reason = error.strerror or error
            raise JudgeDownError(f"{path.parent}: a reply cannot be cached ({reason})") from None

    def _path(self, request: dict[str, Any]) -> Path:
        key = json.dumps([self._url, request], sort_keys=True).encode()
        name = hashlib.sha256(key).hexdigest()
        return self._folder / name[:2] / f"{name}.json"


def _connect(config: ServerConfig, key: str, send: Callable[[Any, Callable[[], Any]], Any]) -> Any:
    """Create an `openai` client each of whose HTTP requests goes through `send`."""
    try:
        import openai
    except ImportError:
        raise InputError(
            "a judge on a server needs the openai package: pip install 'pixellm_jax[judge]'"
        ) from None

    class HttpClient(openai.DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            plain_send = super().send
            return send(request, lambda: plain_send(request, **options))

    return openai.OpenAI(
        api_key=key, base_url=config.url, timeout=config.timeout, http_client=HttpClient()
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds in the Retry-After header, a number or a date; 0 if there is none."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0
