"""High-level interface: an image and a question in, text and one mask per target out."""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8
from PIL import Image
from tqdm import tqdm

from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import fit
from pixellm_jax.images.read import read_image
from pixellm_jax.inference.answer import Answer, AnswerBuilder
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.inference.request import (
    Completion,
    EncodedImage,
    Request,
    check_question,
    check_sampling,
)
from pixellm_jax.inference.service import Service, wait_for
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.prompt import TEMPLATES, follow_up_ids, question_ids
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint

MIN_NEW_TOKENS = 64
"""Number of positions that a prompt must leave for its answer."""

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
"""A path, an open Pillow image or a uint8 array, in any mode (see `images.read.read_image`)."""


class Predictor:
    """Answers questions about images. Any number of threads may share one predictor.

    Example:
        >>> predictor = Predictor.load("pixellm-7b")
        >>> answer = predictor("desk.jpg", "What could I write with?")
        >>> print(answer.text, answer.masks.shape)

    Attributes:
        model: the model, prepared for inference.
        config: its configuration.
        vocabulary: its vocabulary.
        engine: the engine that decodes.
        service: the queue in front of the engine.
    """

    def __init__(
        self,
        model: PixelLM,
        vocabulary: Vocabulary,
        *,
        max_new_tokens: int = 512,
        max_batch: int = 16,
        min_score: float = 0.0,
        weights: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        consume: bool = False,
    ) -> None:
        """Create a predictor.

        Args:
            model: a trained model.
            vocabulary: its vocabulary.
            max_new_tokens: maximum number of new tokens of an answer.
            max_batch: maximum number of questions that are answered at the same time.
            min_score: masks with a lower score are emptied (`Answer.kept`); from 0 to 1.
            weights: see `prepare_for_inference`.
            mesh: see `prepare_for_inference`.
            consume: see `prepare_for_inference`.

        Raises:
            InputError: a number outside its range.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
            if value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        if not 0 <= min_score <= 1:
            raise InputError(f"min_score={min_score}: expected a probability, from 0 to 1")
        self.model = prepare_for_inference(model, weights=weights, mesh=mesh, consume=consume)
        self.config = model.config
        self.vocabulary = vocabulary
        self.max_new_tokens = max_new_tokens
        self.min_score = min_score
        config = EngineConfig(max_batch=max_batch, max_new_tokens=max_new_tokens)
        self.engine = Engine(self.model, vocabulary, config, mesh=mesh)
        self.service = Service(self.engine, max_queue=max(256, 4 * max_batch))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **options: Any,
    ) -> Predictor:
        """Load a checkpoint folder made by `pixellm convert`, straight onto the devices of `mesh`.

        Args:
            path: the checkpoint folder.
            dtype: compute dtype, "float32" or "bfloat16"; None for the checkpoint's.
            mesh: mesh over which the weights are sharded.
            options: the other arguments of the class.

        Raises:
            InputError: `path` is not a checkpoint, or it is damaged.
        """
        path = Path(path)
        model = checkpoint.load_model(path, dtype=dtype, sharding=mesh)
        vocabulary = checkpoint.read_vocabulary(path, model.config)
        return cls(model, vocabulary, mesh=mesh, consume=True, **options)

    def __call__(
        self,
        image: ImageSource,
        question: str,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | np.integer = 0,
    ) -> Answer:
        """Answer `question` about `image`.

        EXIF orientation is applied first: masks belong to the upright image. Temperature 0 decodes
        greedily; above 0, tokens are sampled, reproducibly for the same `seed`.

        Raises:
            InputError: an image that cannot be read or is too elongated, a question that is empty
                or too long for the model, or weights that are not finite.
        """
        request, finish = self.prepare(
            image, question, temperature=temperature, top_p=top_p, seed=seed
        )
        answer: Answer = wait_for(self.service.submit(request, finish))
        if answer.finish_reason == "non_finite":
            self.check_weights()
        return answer

    def submit(
        self, image: ImageSource, question: str, *, timeout: float | None = None, **sampling: Any
    ) -> Future[Answer]:
        """Return a future of the answer; other questions are answered at the same time.

        Blocks for up to `timeout` seconds while the queue is full. Cancelling the future frees its
        row. A callback of the future must not wait for another answer: it runs in the thread that
        makes the masks. `sampling`: as in a call.

        Raises:
            InputError: as a call, except for weights that are not finite: then the answer's
                `finish_reason` is "non_finite".
            queue.Full: no place in the queue became free in time.
        """
        request, finish = self.prepare(image, question, **sampling)
        return self.service.submit(request, finish, timeout=timeout)

    def stream(self, image: ImageSource, question: str, **sampling: Any) -> Iterator[Answer]:
        """Yield the answer as it grows: text at once, a mask as soon as its target is complete.

        The last answer is the final one; closing the iterator frees its row. `sampling`, and what
        is raised: as in `submit`.
        """
        request, build = self.prepare(image, question, **sampling)
        return map(build, self.service.stream(request))

    def chat(self, image: ImageSource) -> ChatSession:
        """Start a chat about one image: each question can refer to the previous ones."""
        return ChatSession(self, read_image(image))

    def batch(
        self, pairs: Sequence[tuple[ImageSource, str]], *, progress: bool = False, **sampling: Any
    ) -> list[Answer]:
        """Answer all pairs of an image and a question, in their order.

        `progress` shows a progress bar. `sampling`: as in a call. Use `each` to continue after an
        error.

        Raises:
            InputError: a pair cannot be answered; the message names its index.
        """
        answers: dict[int, Answer] = {}
        with tqdm(total=len(pairs), disable=not progress, unit="question") as bar:
            for index, answer in self.each(pairs, **sampling):
                if isinstance(answer, InputError):
                    raise InputError(f"pair {index}: {answer}")
                answers[index] = answer
                bar.update()
        return [answers[index] for index in range(len(pairs))]

    def each(
        self, pairs: Iterable[tuple[ImageSource, str]], **sampling: Any
    ) -> Iterator[tuple[int, Answer | InputError]]:
        """Yield the index and the answer of every pair, in the order in which they finish.

        Pairs are read as rows become free. Where a pair cannot be answered, its error takes the
        place of the answer.
        """
        max_batch = self.engine.config.max_batch
        indices: dict[Future[Answer], int] = {}
        finished: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        remaining = enumerate(pairs)
        more = True
        try:
            while more or indices:
                prepared = list[tuple[int, tuple[Request, AnswerBuilder]]]()
                failed = list[tuple[int, InputError]]()
                missing = max(2 * max_batch - len(indices), 0)
                for index, (image, question) in itertools.islice(remaining, missing):
                    try:
                        prepared.append((index, self.prepare(image, question, **sampling)))
                    except InputError as error:
                        failed.append((index, error))
                more = len(prepared) + len(failed) == missing
                futures = self.service.submit_all([job for _, job in prepared])
                for (index, _), future in zip(prepared, futures, strict=True):
                    indices[future] = index
                    future.add_done_callback(finished.put)
                yield from failed
                while indices and (len(indices) > max_batch or not more):
                    future = finished.get()
                    yield indices.pop(future), _answer_or_error(future)
        finally:
            for future in indices:
                future.cancel()

    def prepare(
        self, image: ImageSource, question: str, **sampling: Any
    ) -> tuple[Request, AnswerBuilder]:
        """Return the request of a question, and the function that finishes its completion.

        Raises:
            InputError: as a call.
        """
        check_sampling(**sampling)
        pixels = read_image(image)
        check_question(question)
        tokens = question_ids(
            self.vocabulary,
            TEMPLATES[self.config.template],
            question,
            image_tokens=self.config.image_tokens,
        )
        self.check_prompt_length(len(tokens), "the question makes a prompt")
        canvas, hw = fit(pixels, self.config.vision.canvas)
        return Request(tokens, canvas, hw, **sampling), self.answer_builder(pixels)

    def answer_builder(self, pixels: UInt8[np.ndarray, "y x 3"]) -> AnswerBuilder:
        """Return a function that builds answers about an image from completions."""
        height, width, _ = pixels.shape
        canvas = self.config.vision.canvas
        return AnswerBuilder(self.vocabulary, (height, width), canvas, self.min_score)

    def check_prompt_length(self, length: int, what: str) -> None:
        """Check that a prompt leaves positions for an answer; errors begin with `what`.

        Raises:
            InputError: it does not.
        """
        limit = self.config.language.max_positions - min(self.max_new_tokens, MIN_NEW_TOKENS)
        if length > limit:
            raise InputError(
                f"{what} of {length} tokens, the model has room for {limit} before an answer; "
                "shorten it"
            )

    def check_weights(self) -> None:
        """Check that all weights are finite.

        Raises:
            InputError: a weight is not; the message names it.
        """
        for path, variable in nnx.to_flat_state(nnx.state(self.model)):
            value = variable[...]
            if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.isfinite(value).all():
                raise InputError(
                    f"{'.'.join(map(str, path))}: the weights have values that are not finite; "
                    "the checkpoint is damaged, convert or copy it again"
                )


class ChatSession:
    """Questions about one image in turn, each of which can refer to the previous ones.

    Example:
        >>> chat = predictor.chat("desk.jpg")
        >>> chat("What could I write with?").text
        >>> chat("And which of these is nearest?").masks

    Attributes:
        predictor: the predictor that answers.
        image: RGB pixels.
        answers: the answers so far.
    """

    def __init__(self, predictor: Predictor, image: UInt8[np.ndarray, "y x 3"]) -> None:
        self.predictor = predictor
        self.image = image
        self.answers: tuple[Answer, ...] = ()
        self._context: EncodedImage | None = None
        self._uncached = np.zeros(0, np.int32)  # ids of the last answer that are not in its cache

    @property
    def masks(self) -> Bool[np.ndarray, "m y x"]:
        """Masks of all answers, in order."""
        none = np.zeros((0, *self.image.shape[:2]), bool)
        return np.concatenate([none, *(answer.masks for answer in self.answers)])

    def __call__(self, question: str, **sampling: Any) -> Answer:
        """Return the next answer, whose `earlier` are the previous ones.

        Args:
            question: the next question.
            sampling: `temperature`, `top_p` and `seed`, as in `Predictor.__call__`.

        Raises:
            InputError: as in `Predictor.__call__`, or the chat is too long for the model.
        """
        request, build = self._prepare(question, **sampling)

        def finish(completion: Completion) -> tuple[Answer, Completion]:
            return build(completion, self.answers), completion

        answer, completion = wait_for(self.predictor.service.submit(request, finish))
        if answer.finish_reason == "non_finite":
            self.predictor.check_weights()
            raise InputError(
                "the answer has values that are not finite; the conversation continues without it"
            )
        self.answers += (answer,)
        assert completion.context is not None
        num_cached = int(completion.context.prefix.length[0]) - request.prompt_length
        end = [] if answer.complete else [self.predictor.vocabulary.eos]
        self._uncached = np.asarray([*completion.tokens[num_cached:], *end], np.int32)
        self._context = completion.context
        return answer

    def _prepare(self, question: str, **sampling: Any) -> tuple[Request, AnswerBuilder]:
        """Return the request of a question, and the builder of its answer."""
        predictor = self.predictor
        if self._context is None:
            request, build = predictor.prepare(self.image, question, **sampling)
            return request._replace(keep_context=True), build
        check_sampling(**sampling)
        check_question(question)
        template = TEMPLATES[predictor.config.template]
        ids = follow_up_ids(predictor.vocabulary, template, question)
        tokens = np.concatenate([self._uncached, ids])
        request = Request(tokens, context=self._context, keep_context=True, **sampling)
        predictor.check_prompt_length(request.prompt_length, "the conversation makes a prompt")
        return request, predictor.answer_builder(self.image)


def _answer_or_error(future: Future[Answer]) -> Answer | InputError:
    error = future.exception()
    if isinstance(error, InputError):
        return error
    return future.result()
