"""A judge behind any server that speaks the OpenAI protocol for chat completions."""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.cache import ReplyCache
from pixellm_jax.evaluation.judge.prompt import (
    PROMPT_VERSION,
    Reply,
    read_reply,
    read_scores,
    write_request,
)
from pixellm_jax.evaluation.judge.question import JudgeDownError, JudgeQuestion, NotJudgedError

KEY = "OPENAI_API_KEY"
"""The environment variable with the key. It is sent to the server and written nowhere."""

_SHORTEST_KEY = 8
"""A shorter one is no secret: it is the word that a local server wants, and may occur in text."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the judge is and how it is asked.

    url: the base of the interface, such as `http://localhost:8000/v1`. temperature: None for the
    server's own (some models take no other). timeout: seconds until the reply begins, and between
    its parts. tries: how often a question is asked while the server fails or is not understood.
    rate_limit_tries: the same while the server only asks for patience. first_pause: seconds before
    the second try, twice as long before each further one, `longest_pause` at most. A server that
    asks for more seconds than `longest_wait` ends the run. workers: requests at a time.
    """

    url: str
    model: str
    temperature: float | None = 0.0
    timeout: float = 60.0
    tries: int = 5
    rate_limit_tries: int = 30
    first_pause: float = 1.0
    longest_pause: float = 30.0
    longest_wait: float = 120.0
    workers: int = 8

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
            known = known and parts.port != 0 and parts.username is None and not parts.query
        except ValueError:
            known = False
        if not known:
            raise InputError(
                "the judge's URL is not http(s)://HOST[:PORT]/PATH without a name, password or "
                f"query; the key belongs into the environment ({KEY})"
            )
        if not self.model:
            raise InputError("the judge's model has no name")
        if min(self.workers, self.tries, self.rate_limit_tries) < 1 or not self.timeout > 0:
            raise InputError("the judge needs at least one worker, one try and some time")


class ServerJudge:
    """The judge. Several threads may ask it at once.

    Raises:
        InputError: the `openai` package is not there, or the key is not one.
    """

    def __init__(self, config: ServerConfig, cache: Path) -> None:
        host = urlsplit(config.url).netloc
        temperature = "its own" if config.temperature is None else f"{config.temperature:g}"
        self.name = f"{config.model} at {host} (prompt {PROMPT_VERSION}, temperature {temperature})"
        self.workers = config.workers
        self._config = config
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise InputError(f"{KEY} is no key: it has blanks or letters that no key has")
        self._client = _connect(config, self._key or "none")
        self._cache = ReplyCache(cache, config.url)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._models: set[str] = set()
        self._open_at = 0.0  # no request before this moment; `time.monotonic`

    def score(self, question: JudgeQuestion) -> list[int]:
        """A score from 1 to 10 for each target, from the cache where it has the same request.

        Raises:
            NotJudgedError: every try failed, or the server refuses this question.
            JudgeDownError: the server refuses all questions, or asks for much patience.
        """
        request = write_request(
            question, model=self._config.model, temperature=self._config.temperature
        )
        kept = self._cache.get(request)
        if kept is not None:
            try:
                scores = read_scores(kept.text, len(question.descriptions))
            except NotJudgedError:
                pass  # a reply that was understood differently by another version
            else:
                self._count(from_cache=1)
                return self._finish(kept, scores)
        failures = limits = 0
        while True:
            self._wait()
            try:
                reply, scores = self._ask(request, len(question.descriptions))
            except _RateLimitError as limit:
                limits += 1
                if limits == self._config.rate_limit_tries:
                    raise NotJudgedError(f"rate limit, {limits} times in a row") from None
                self._hold_all(max(limit.seconds, self._pause(limits)))
            except _RefusedError:
                raise
            except NotJudgedError:
                failures += 1
                if failures == self._config.tries:
                    raise
                self._count(retries=1)
                time.sleep(self._pause(failures))
            else:
                self._cache.put(request, reply)
                return self._finish(reply, scores)

    def describe(self) -> dict[str, object]:
        """What a report says about the judge; the key is not in it."""
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
        """What was sent and what came back.

        requests: sent. from_cache: scores that cost nothing. retries: after a failure.
        rate_limited, timeouts, server_errors, no_connection, malformed: replies of that kind.
        tokens_in, tokens_out: of this run's requests, useless replies included.
        scored_tokens_in, scored_tokens_out: behind all scores, kept replies included.
        without_tokens: replies that do not say their tokens.
        """
        with self._lock:
            return {name: count for name, count in sorted(self._counts.items()) if count}

    def _ask(self, request: dict[str, Any], targets: int) -> tuple[Reply, list[int]]:
        import openai

        self._count(requests=1)
        try:
            raw = self._client.chat.completions.with_raw_response.create(**request)
        except openai.APITimeoutError:
            self._count(timeouts=1)
            raise NotJudgedError(f"no reply in {self._config.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._judge_status(error) from None
        except openai.APIConnectionError as error:
            self._count(no_connection=1)
            raise NotJudgedError(
                self._tidy(f"no connection ({error.__cause__ or error})")
            ) from None
        try:
            reply = read_reply(self._hide_key(raw.http_response.text).encode())
            read, written = reply.tokens or (0, 0)
            self._count(tokens_in=read, tokens_out=written, without_tokens=reply.tokens is None)
            return reply, read_scores(reply.text, targets)
        except NotJudgedError:
            self._count(malformed=1)
            raise

    def _judge_status(self, error: Any) -> Exception:
        """What a status other than 200 means for this question, and for all."""
        status = error.status_code
        message = self._tidy(f"the server answers {status}: {error.message}")
        if status == 429:
            self._count(rate_limited=1)
            if error.code == "insufficient_quota":
                return JudgeDownError(f"{message}; the account is used up")
            return _RateLimitError(_retry_after(error.response.headers))
        if status in (401, 403, 404):
            return JudgeDownError(f"{message}; check --judge-url, --judge-model and {KEY}")
        if status >= 500 or status in (408, 409):
            self._count(server_errors=1)
            return NotJudgedError(message)
        self._count(refused=1)
        return _RefusedError(message)

    def _wait(self) -> None:
        while (left := self._open_at - time.monotonic()) > 0:
            time.sleep(left)

    def _pause(self, number: int) -> float:
        """Seconds before the next try, after so many failures."""
        doubled = self._config.first_pause * 2 ** min(number - 1, 30)
        # A random part, so that the workers do not come back as one.
        return min(doubled, self._config.longest_pause) * (1 - 0.25 * random.random())

    def _hold_all(self, seconds: float) -> None:
        """A rate limit is everybody's."""
        if seconds > self._config.longest_wait:
            raise JudgeDownError(f"the server asks for a pause of {seconds:.0f} s; come back later")
        with self._lock:
            self._open_at = max(self._open_at, time.monotonic() + seconds)

    def _finish(self, reply: Reply, scores: list[int]) -> list[int]:
        read, written = reply.tokens or (0, 0)
        self._count(scored_tokens_in=read, scored_tokens_out=written)
        with self._lock:
            self._models.add(reply.model)
        return scores

    def _count(self, **events: int) -> None:
        with self._lock:
            self._counts.update(events)

    def _tidy(self, text: str) -> str:
        """One line of a foreign message, without the key."""
        return self._hide_key(" ".join(text.split()))[:300]

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_KEY else text


class _RefusedError(NotJudgedError):
    """The server will not answer this question, however often it is asked."""


class _RateLimitError(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__("rate limit")
        self.seconds = seconds


def _connect(config: ServerConfig, key: str) -> Any:
    try:
        import openai
    except ImportError:
        raise InputError(
            "a judge on a server needs the openai package: pip install 'pixellm_jax[judge]'"
        ) from None
    return openai.OpenAI(api_key=key, base_url=config.url, timeout=config.timeout, max_retries=0)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for, by a number or a date; 0 if it names none."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0
