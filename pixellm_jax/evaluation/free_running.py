"""Free-running evaluation (mode "generated"): the model writes its answers to the questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.evaluation.prompts import CanvasCache, encode_question
from pixellm_jax.evaluation.record import DAMAGED, TOO_LONG
from pixellm_jax.evaluation.scoring import Answered, empty_non_finite, no_masks
from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.engine import Engine
from pixellm_jax.inference.request import Completion, Request
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.prompt import TEMPLATES, expand_images
from pixellm_jax.text.vocabulary import Vocabulary


def answer_free_running(
    engine: Engine,
    vocabulary: Vocabulary,
    questions: Iterable[BenchmarkQuestion],
    watch: Stopwatch,
    left_out: dict[str, str],
) -> Iterator[Answered]:
    """Answer questions with the engine, in the order of completion.

    Codebook tokens of earlier answers are part of the prompt; only new ones are targets. A question
    whose prompt exceeds the model's positions gets an empty answer.

    Args:
        engine: the continuous-batching engine.
        vocabulary: the vocabulary of its model.
        questions: read ahead as the engine has capacity.
        watch: times the activity "io".
        left_out: receives the images that cannot be used, with the reason.
    """
    config = engine.model.config
    canvases = CanvasCache(config.vision.canvas, left_out)
    pending: dict[int, BenchmarkQuestion] = {}
    too_long: list[Answered] = []

    def requests() -> Iterator[Request]:
        number = 0
        for question in questions:
            with watch("io"):
                canvas = canvases(question)
                if canvas is None:
                    continue
                template = TEMPLATES[config.template]
                ids = encode_question(vocabulary, template, question, "").ids
                tokens = expand_images(ids, config.image_tokens)
            if len(tokens) >= config.language.max_positions:
                too_long.append(Answered(question, no_masks(question), "", TOO_LONG))
                continue
            pending[number] = question
            number += 1
            yield Request(tokens, *canvas)

    for number, completion in engine.generate(requests()):
        yield from too_long
        too_long.clear()
        yield _answered(pending.pop(number), completion, vocabulary, config.vision.canvas)
    yield from too_long


def _answered(
    question: BenchmarkQuestion, completion: Completion, vocabulary: Vocabulary, canvas: int
) -> Answered:
    reason = completion.finish_reason
    if reason == "non_finite":
        reason = DAMAGED
    logits, reason = empty_non_finite(completion.targets.mask_logits, reason)
    text = read_answer(vocabulary, completion.tokens, completion.targets.codebook_index).text
    return Answered(question, unfit(logits, question.hw, canvas), text, reason)
