"""Replies of a judge on disk, one file for each request."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pixellm_jax.evaluation.judge.prompt import Reply
from pixellm_jax.evaluation.judge.question import JudgeDownError
from pixellm_jax.files import write_whole


class ReplyCache:
    """Replies by the whole request: server, model, prompt, question and settings.

    A file appears whole or not at all. One that is damaged, or of another request, counts as not
    there and is replaced. Threads and processes may share a folder.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url

    def get(self, request: dict[str, Any]) -> Reply | None:
        """The reply to a request, if there is one."""
        try:
            entry = json.loads(self._path(request).read_bytes())
            if entry["url"] != self._url or entry["request"] != request:
                return None
            text, model, tokens = (entry["reply"][key] for key in Reply._fields)
            known = tokens is None or [type(count) for count in tokens] == [int, int]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not (isinstance(text, str) and isinstance(model, str) and known):
            return None
        return Reply(text, model, tokens and (tokens[0], tokens[1]))

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        """Keeps a reply.

        Raises:
            JudgeDownError: it cannot be written.
        """
        path = self._path(request)
        entry = {"url": self._url, "request": request, "reply": reply._asdict()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(entry))
        except OSError as error:
            reason = error.strerror or error
            raise JudgeDownError(f"{path.parent}: a reply cannot be kept ({reason})") from None

    def _path(self, request: dict[str, Any]) -> Path:
        whole = json.dumps([self._url, request], sort_keys=True).encode()
        name = hashlib.sha256(whole).hexdigest()
        return self._folder / name[:2] / f"{name}.json"
