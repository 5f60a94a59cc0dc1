"""Pictures that were read: each is encoded, and its prefix run, once for all its questions."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pixellm_jax.inference import decoding
from pixellm_jax.inference.compilation import Programs, bucket
from pixellm_jax.inference.request import Question, Seen
from pixellm_jax.model.pixellm import PixelLM

_Key = tuple[bytes, tuple[int, int], bytes]


class Pictures:
    """Keeps the `limit` pictures that were asked about last; reads `together` at once at most."""

    def __init__(self, model: PixelLM, programs: Programs, *, limit: int, together: int) -> None:
        self.model, self.programs, self.limit, self.together = model, programs, limit, together
        self._seen: OrderedDict[_Key, Seen] = OrderedDict()

    def read(self, questions: Sequence[Question]) -> list[Seen]:
        """The picture of every question; equal pictures are read once."""
        keys = [_key(question) for question in questions]
        new: dict[int, dict[_Key, Question]] = {}  # by the length of the prefix
        for key, question in zip(keys, questions, strict=True):
            if key is not None and key not in self._seen:
                new.setdefault(question.shared, {})[key] = question
        for length, unread in new.items():
            items = list(unread.items())
            for start in range(0, len(items), self.together):
                self._read(dict(items[start : start + self.together]), length)
        found = list[Seen]()
        for key, question in zip(keys, questions, strict=True):
            if key is not None:
                self._seen.move_to_end(key)
            found.append(self._seen[key] if key is not None else question.seen)  # type: ignore
        while len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forgets all pictures."""
        self._seen.clear()

    def _read(self, unread: dict[_Key, Question], length: int) -> None:
        """Reads pictures in a bucket of 1, 4, 16, ...; the last one stands in for those missing."""
        questions, size = list(unread.values()), min(bucket(len(unread)), self.together)
        questions += questions[-1:] * (size - len(questions))
        canvases = np.stack([question.canvas for question in questions])  # type: ignore[misc]
        hw = np.asarray([question.hw for question in questions], np.int32)
        tokens = np.stack([question.tokens[:length] for question in questions])
        features = self.programs(decoding.encode, self.model, canvases, hw)
        prefix = self.programs(
            decoding.read_prefix, self.model, features.tokens, features.token_valid, tokens
        )
        pictures = self.programs(decoding.apart, Seen(prefix, features.maps))
        self._seen.update(zip(unread, pictures, strict=False))


def _key(question: Question) -> _Key | None:
    if question.seen is not None:
        return None
    assert question.canvas is not None
    digest = hashlib.blake2b(question.canvas.tobytes(), digest_size=16).digest()
    return digest, question.hw, question.tokens[: question.shared].tobytes()
