"""Questions of a benchmark, answered by the model in its own words (mode `generated`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.evaluation.prompts import Canvases, encode_question
from pixellm_jax.evaluation.scoring import TOO_LONG, Answered, no_masks, sound
from pixellm_jax.images.geometry import unfit
from pixellm_jax.inference.engine import Engine
from pixellm_jax.inference.request import Completion, Request
from pixellm_jax.stopwatch import Stopwatch
from pixellm_jax.text.answer import read_answer
from pixellm_jax.text.prompt import TEMPLATES, expand_images
from pixellm_jax.text.vocabulary import Vocabulary


def answer_generated(
    engine: Engine,
    vocabulary: Vocabulary,
    asked: Iterable[BenchmarkQuestion],
    watch: Stopwatch,
    left_out: dict[str, str],
) -> Iterator[Answered]:
    """Asks everything through the engine; answers come in the order in which they end.

    Codebook tokens of earlier answers are part of the prompt; only new ones are targets. A prompt
    that the model has no room for is answered by nothing. Pictures that cannot be used go into
    `left_out`, with the reason.
    """
    config = engine.model.config
    canvases = Canvases(config.vision.canvas, left_out)
    waiting: dict[int, BenchmarkQuestion] = {}
    refused: list[Answered] = []

    def questions() -> Iterator[Request]:
        number = 0
        for item in asked:
            with watch("io"):
                laid = canvases(item)
                if laid is None:
                    continue
                ids = encode_question(vocabulary, TEMPLATES[config.template], item, "").ids
                tokens = expand_images(ids, config.image_tokens)
            if len(tokens) >= config.language.max_positions:
                refused.append(Answered(item, no_masks(item), "", TOO_LONG))
                continue
            waiting[number] = item
            number += 1
            yield Request(tokens, *laid)

    for number, result in engine.generate(questions()):
        yield from refused
        refused.clear()
        yield _answered(waiting.pop(number), result, vocabulary, config.vision.canvas)
    yield from refused


def _answered(
    item: BenchmarkQuestion, result: Completion, vocabulary: Vocabulary, canvas: int
) -> Answered:
    reason = "damaged" if result.finish_reason == "non_finite" else result.finish_reason
    logits, reason = sound(result.targets.mask_logits, reason)
    text = read_answer(vocabulary, result.tokens, result.targets.codebook_index).text
    return Answered(item, unfit(logits, item.hw, canvas), text, reason)
