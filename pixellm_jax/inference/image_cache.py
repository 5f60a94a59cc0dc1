"""LRU cache of encoded images: an image and its prefix are encoded once for all its requests."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pixellm_jax.inference import decoding
from pixellm_jax.inference.compilation import CompileCounter, bucket
from pixellm_jax.inference.request import EncodedImage, Request
from pixellm_jax.model.pixellm import PixelLM

_Key = tuple[bytes, tuple[int, int], bytes]


class ImageCache:
    """Least-recently-used cache of encoded images, keyed by pixels, size and prefix.

    Attributes:
        capacity: number of images that are kept.
        batch_size: number of images that are encoded in one call, at most.
    """

    def __init__(
        self, model: PixelLM, counter: CompileCounter, *, capacity: int, batch_size: int
    ) -> None:
        self.model = model
        self.counter = counter
        self.capacity = capacity
        self.batch_size = batch_size
        self._images: OrderedDict[_Key, EncodedImage] = OrderedDict()

    def encode(self, requests: Sequence[Request]) -> list[EncodedImage]:
        """Return the encoded image of every request; equal images are encoded once."""
        keys = [_key(request) for request in requests]
        missing: dict[int, dict[_Key, Request]] = {}  # by the length of the prefix
        for key, request in zip(keys, requests, strict=True):
            if key is not None and key not in self._images:
                missing.setdefault(request.prefix_length, {})[key] = request
        for length, by_key in missing.items():
            items = list(by_key.items())
            for start in range(0, len(items), self.batch_size):
                self._encode(dict(items[start : start + self.batch_size]), length)
        encoded = list[EncodedImage]()
        for key, request in zip(keys, requests, strict=True):
            if key is not None:
                self._images.move_to_end(key)
            encoded.append(self._images[key] if key is not None else request.context)  # type: ignore
        while len(self._images) > self.capacity:
            self._images.popitem(last=False)
        return encoded

    def clear(self) -> None:
        """Forget all images."""
        self._images.clear()

    def _encode(self, missing: dict[_Key, Request], prefix_length: int) -> None:
        """Encode images in a bucket of 1, 4, 16, ...; copies of the last one fill it up."""
        requests = list(missing.values())
        size = min(bucket(len(missing)), self.batch_size)
        requests += requests[-1:] * (size - len(requests))
        canvases = np.stack([request.canvas for request in requests])  # type: ignore[misc]
        hw = np.asarray([request.hw for request in requests], np.int32)
        tokens = np.stack([request.tokens[:prefix_length] for request in requests])
        features = self.counter.call(decoding.encode, self.model, canvases, hw)
        prefix = self.counter.call(
            decoding.read_prefix, self.model, features.tokens, features.token_valid, tokens
        )
        images = self.counter.call(decoding.unstack, EncodedImage(prefix, features.maps))
        self._images.update(zip(missing, images, strict=False))


def _key(request: Request) -> _Key | None:
    """Return the key of a request's image, None where the request has a context instead."""
    if request.context is not None:
        return None
    assert request.canvas is not None
    digest = hashlib.blake2b(request.canvas.tobytes(), digest_size=16).digest()
    return digest, request.hw, request.tokens[: request.prefix_length].tobytes()
