"""The model for people: a picture and a question in, text and one mask per target out."""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int32, UInt8
from PIL import Image
from tqdm import tqdm

from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.images.geometry import fit
from pixellm_jax.images.read import read_image
from pixellm_jax.inference.answer import Answer, AnswerMaker
from pixellm_jax.inference.engine import Engine, EngineConfig
from pixellm_jax.inference.prepare import serve
from pixellm_jax.inference.request import Question, Result, Seen
from pixellm_jax.inference.request_checks import check_draw, check_question
from pixellm_jax.inference.service import Service
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.prompt import TEMPLATES, encode_conversation, question_ids
from pixellm_jax.text.vocabulary import Vocabulary
from pixellm_jax.weights import checkpoint

LEAST_ANSWER = 64
"""Room for so many new tokens must be left by a prompt, of the positions that the model has."""

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""A path, an open Pillow image or a uint8 array, in any mode (see `image.read_image`)."""


class Predictor:
    """Answers questions about pictures. Any number of threads may use one predictor."""

    def __init__(
        self,
        model: PixelLM,
        vocabulary: Vocabulary,
        *,
        max_new_tokens: int = 512,
        rows: int = 16,
        min_score: float = 0.0,
        weights: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        consume: bool = False,
    ) -> None:
        """`rows`: questions answered at the same time, at most.

        `weights`, `mesh`, `consume`: see `serve`.

        `min_score`: masks of a lower score are emptied (`Answer.kept`).
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("rows", rows)):
            if value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        if not 0 <= min_score <= 1:
            raise InputError(f"min_score={min_score}: expected a probability, from 0 to 1")
        self.model = serve(model, weights=weights, mesh=mesh, consume=consume)
        self.config, self.vocabulary = model.config, vocabulary
        self.max_new_tokens, self.min_score = max_new_tokens, min_score
        settings = EngineConfig(rows=rows, max_new_tokens=max_new_tokens)
        self.engine = Engine(self.model, vocabulary, settings, mesh=mesh)
        self._service = Service(self.engine, waiting=max(256, 4 * rows))
        self._finishing = ThreadPoolExecutor(1, "pixellm masks")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **options: Any,
    ) -> Predictor:
        """Reads a checkpoint folder made by `pixellm convert`, straight onto the devices of `mesh`.

        `dtype` ("float32" or "bfloat16") replaces the compute dtype of the checkpoint. The other
        options are those of the class.

        Raises:
            InputError: `path` is not a checkpoint, or it is damaged.
        """
        path = Path(path)
        model = checkpoint.load_model(path, dtype=dtype, sharding=mesh)
        vocabulary = checkpoint.read_vocabulary(path, model.config)
        return cls(model, vocabulary, mesh=mesh, consume=True, **options)

    def __call__(
        self,
        image: Picture,
        question: str,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | np.integer = 0,
    ) -> Answer:
        """Answers `question` about `image`.

        EXIF orientation is applied first: masks belong to the upright picture. Temperature 0 says
        the most likely words; above 0 words are drawn, the same for the same `seed`.

        Raises:
            InputError: an image that cannot be read or is too elongated, a question that is empty
                or too long for the model, or weights that are not finite.
        """
        draw: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        answer = _wait(self.submit(image, question, **draw))
        if answer.reason == "damaged":
            self._check_weights()
        return answer

    def submit(
        self, image: Picture, question: str, *, timeout: float | None = None, **draw: Any
    ) -> Future[Answer]:
        """The answer, later; `draw` as in a call. Other questions are answered at the same time.

        Waits, up to `timeout` seconds, while very many questions are waiting. A callback of the
        future must not wait for another answer: it runs in the thread that makes the masks.

        Raises:
            InputError: as a call, but for weights: the reason of the answer is then "damaged".
            queue.Full: no place in the queue became free.
        """
        asked, make = self._ask(image, question, **draw)
        return self._promise(self._service.submit(asked, timeout=timeout), make)

    def _promise(self, result: Future[Result], make: AnswerMaker) -> Future[Answer]:
        """The answer that will be made of a result, in a thread for that."""
        answer = Future[Answer]()

        def finish() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(make(result.result()))
                except BaseException as error:  # raised where the answer is waited for
                    answer.set_exception(error)

        def dropped(answer: Future[Answer]) -> None:
            if answer.cancelled():
                self._service.drop(result)

        def ended(_: Future[Result]) -> None:
            try:
                self._finishing.submit(finish)
            except RuntimeError:  # the main thread has ended, others go on
                finish()

        answer.add_done_callback(dropped)
        result.add_done_callback(ended)
        return answer

    def stream(self, image: Picture, question: str, **draw: Any) -> Iterator[Answer]:
        """The answer as it grows: text at once, a mask as soon as its target is complete.

        The last answer has ended. `draw`, and what is raised: as in `submit`.
        """
        asked, make = self._ask(image, question, **draw)
        return map(make, self._service.stream(asked))

    def conversation(self, image: Picture) -> Conversation:
        """Several questions about one picture, each of which knows those before it."""
        return Conversation(self, read_image(image))

    def batch(
        self, pairs: Sequence[tuple[Picture, str]], *, progress: bool = False, **draw: Any
    ) -> list[Answer]:
        """Answers all pairs of picture and question, in their order.

        `progress` shows a bar. `draw`: as in a call. (`each` goes on where this raises.)

        Raises:
            InputError: a pair cannot be answered; its number is named.
        """
        answers: dict[int, Answer] = {}
        with tqdm(total=len(pairs), disable=not progress, unit="question") as bar:
            for number, answer in self.each(pairs, **draw):
                if isinstance(answer, InputError):
                    raise InputError(f"pair {number}: {answer}")
                answers[number] = answer
                bar.update()
        return [answers[number] for number in range(len(pairs))]

    def each(
        self, pairs: Iterable[tuple[Picture, str]], **draw: Any
    ) -> Iterator[tuple[int, Answer | InputError]]:
        """Number and answer of every pair, as they come; pairs are read as rows become free.

        Where a pair cannot be answered, the error stands in place of its answer.
        """
        together = self.engine.config.rows
        under_way: dict[Future[Answer], int] = {}
        ended: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        coming, left = enumerate(pairs), True
        try:
            while left or under_way:
                asked = list[tuple[int, Question, AnswerMaker]]()
                failed = list[tuple[int, InputError]]()
                missing = max(2 * together - len(under_way), 0)
                for number, (image, question) in itertools.islice(coming, missing):
                    try:
                        asked.append((number, *self._ask(image, question, **draw)))
                    except InputError as error:
                        failed.append((number, error))
                left = len(asked) + len(failed) == missing
                results = self._service.submit_together([question for _, question, _ in asked])
                for (number, _, make), result in zip(asked, results, strict=True):
                    future = self._promise(result, make)
                    under_way[future] = number
                    future.add_done_callback(ended.put)
                yield from failed
                while under_way and (len(under_way) > together or not left):
                    future = ended.get()
                    yield under_way.pop(future), _answer_or_error(future)
        finally:
            for future in under_way:
                future.cancel()

    def _ask(self, image: Picture, question: str, **draw: Any) -> tuple[Question, AnswerMaker]:
        """What the engine is asked, and what makes an answer of its result."""
        check_draw(**draw)
        picture = read_image(image)
        return self._question(picture, question)._replace(**draw), self._maker(picture)

    def _question(self, picture: np.ndarray, question: str) -> Question:
        check_question(question)
        tokens = question_ids(
            self.vocabulary,
            TEMPLATES[self.config.template],
            question,
            image_tokens=self.config.image_tokens,
        )
        self._check_length(len(tokens), "the question makes a prompt")
        canvas, hw = fit(picture, self.config.vision.canvas)
        return Question(tokens, canvas, hw)

    def _check_length(self, length: int, what: str) -> None:
        limit = self.config.language.max_positions - min(self.max_new_tokens, LEAST_ANSWER)
        if length > limit:
            raise InputError(
                f"{what} of {length} tokens, the model has room for {limit} before an answer; "
                "shorten it"
            )

    def _maker(self, picture: np.ndarray) -> AnswerMaker:
        hw, canvas = picture.shape[:2], self.config.vision.canvas
        return AnswerMaker(self.vocabulary, hw, canvas, self.min_score)

    def _check_weights(self) -> None:
        """Names weights that are not finite, if there are any."""
        for path, variable in nnx.to_flat_state(nnx.state(self.model)):
            value = variable[...]
            if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.isfinite(value).all():
                raise InputError(
                    f"{'.'.join(map(str, path))}: the weights have values that are not finite; "
                    "the checkpoint is damaged, convert or copy it again"
                )


class Conversation:
    """Questions about one picture in turn. What was said is not read again: its cache is kept.

    answers: so far. masks: of all of them; the targets of a conversation are numbered through.
    """

    def __init__(self, predictor: Predictor, picture: UInt8[np.ndarray, "y x 3"]) -> None:
        self.predictor, self.picture = predictor, picture
        self.answers: tuple[Answer, ...] = ()
        self._seen: Seen | None = None
        self._unread = np.zeros(0, np.int32)

    @property
    def masks(self) -> Bool[np.ndarray, "m y x"]:
        """Of all answers."""
        none = np.zeros((0, *self.picture.shape[:2]), bool)
        return np.concatenate([none, *(answer.masks for answer in self.answers)])

    def __call__(self, question: str, **draw: Any) -> Answer:
        """The next answer; `answer.earlier` holds those before it. `draw`: as of the predictor.

        Raises:
            InputError: as of the predictor, or the conversation is too long for the model.
        """
        check_draw(**draw)
        predictor, before = self.predictor, 0
        if self._seen is None:
            asked = predictor._question(self.picture, question)
        else:
            check_question(question)
            own = follow_up_ids(predictor.vocabulary, predictor.config, question)
            asked = Question(np.concatenate([self._unread, own]), seen=self._seen)
            before = int(self._seen.prefix.length[0])
            length = before + len(asked.tokens)
            predictor._check_length(length, "the conversation makes a prompt")
        result = _wait(predictor._service.submit(asked._replace(keep=True, **draw)))
        answer = predictor._maker(self.picture)(result, self.answers)
        if answer.reason == "damaged":
            predictor._check_weights()
            raise InputError(
                "the answer has numbers that are not finite; the conversation goes on without it"
            )
        self.answers += (answer,)
        self._seen = result.seen
        assert result.seen is not None
        fed = int(result.seen.prefix.length[0]) - before - len(asked.tokens)
        end = [] if answer.complete else [predictor.vocabulary.eos]
        self._unread = np.asarray([*result.tokens[fed:], *end], np.int32)
        return answer


def follow_up_ids(
    vocabulary: Vocabulary, config: ModelConfig, question: str
) -> Int32[np.ndarray, "t"]:
    """Ids that follow on the `</s>` of an answer: the next question, up to where its answer starts.

    They do not depend on what was said before, because `</s>` cuts a text for the tokenizer.
    """
    said = [f"{IMAGE}\n?", "!", question, ""]
    ids, supervised, _ = encode_conversation(vocabulary, TEMPLATES[config.template], said, images=1)
    return ids[1 + int(np.flatnonzero(supervised)[-1]) :]


def _wait(future: Future[Any]) -> Any:
    """The result; whoever stops waiting needs no answer."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _answer_or_error(future: Future[Answer]) -> Answer | InputError:
    error = future.exception()
    if isinstance(error, InputError):
        return error
    return future.result()
