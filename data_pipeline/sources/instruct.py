"""Reader of LLaVA-Instruct: visual instruction-tuning conversations without masks.

Layout: docs/reference_notes.md 1.7. `llava_dataset/llava_instruct_150k.json` is a list of
`{id, image, conversations: [{from: "human" | "gpt", value}, ...]}`, with images from COCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DamagedError
from data_pipeline.example import Example, Turn
from data_pipeline.formats.json_items import Span, fetch, items
from data_pipeline.reading import (
    Reading,
    check_split,
    check_text,
    find_index,
    path_inside,
    read_image_file,
)
from pixellm_jax.benchmark_question import IMAGE
from pixellm_jax.errors import InputError

HUMAN, ASSISTANT = "human", "gpt"


class InstructEntry(NamedTuple):
    """Location of a conversation in the index, and the folder of its image.

    key: index of the entry in the file and its published id, which is not unique.
    """

    key: str
    split: str
    file: Path
    span: Span
    image_folder: Path


@dataclass(frozen=True, kw_only=True)
class LlavaInstruct:
    """Reader of one LLaVA-Instruct file.

    Attributes:
        file: name of the index in `llava_dataset`, without ".json".
    """

    dataset: str = "llava_instruct"
    file: str = "llava_instruct_150k"
    splits: tuple[str, ...] = ("train",)

    def entries(self, root: Path, split: str) -> Sequence[InstructEntry]:
        check_split(self, split)
        index = find_index([root / "llava_dataset" / f"{self.file}.json"])
        image_folder = root / "coco" / "train2017"
        entries = []
        for number, item in enumerate(items(index)):
            if item.key:
                raise InputError(f"'{index}' is an object, expected a list of conversations")
            name = item.value.get("id") if isinstance(item.value, dict) else None
            key = (
                f"{number}/{name}" if isinstance(name, str) and name.isprintable() else f"{number}"
            )
            entries.append(InstructEntry(key, split, index, item.span, image_folder))
        return entries

    def read(self, entry: InstructEntry) -> Reading:
        value = _fetch(entry)
        turns, problems = _turns(_messages(value.get("conversations")))
        image, hw = read_image_file([path_inside(entry.image_folder, value["image"])])
        example = Example(
            key=entry.key,
            dataset=self.dataset,
            split=entry.split,
            kind="instruct",
            image=image,
            hw=hw,
            conversations=(turns,),
        )
        return Reading(example, problems)

    def image_path(self, entry: InstructEntry) -> Path:
        """Return the path of an entry's image."""
        return path_inside(entry.image_folder, _fetch(entry)["image"])


def _fetch(entry: InstructEntry) -> dict[str, Any]:
    value = fetch(entry.file, entry.span)
    if not isinstance(value, dict):
        raise DamagedError(f"a {type(value).__name__}, expected an object with a conversation")
    if "image" not in value:
        raise DamagedError("a conversation without a picture")
    return value


def _messages(conversation: object) -> list[tuple[str, str]]:
    """Return (speaker, text) pairs: ("human", "Where is it?"), ("gpt", "On the table."), ..."""
    if not isinstance(conversation, list):
        raise DamagedError(f"conversations is a {type(conversation).__name__}, expected a list")
    messages = []
    for number, message in enumerate(conversation):
        fields: dict[str, Any] = message if isinstance(message, dict) else {}
        speaker, text = fields.get("from"), fields.get("value")
        if speaker not in (HUMAN, ASSISTANT):
            raise DamagedError(f"message {number} is from {speaker!r}, expected human or gpt"[:200])
        messages.append((str(speaker), check_text(text, f"message {number}")))
    return messages


def _turns(messages: Sequence[tuple[str, str]]) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    r"""Pair questions with their answers; also return a note on each part that was dropped.

    An answer before the first question is dropped, as in the released code. `<image>` is removed
    and the text around it stripped, because every conversation starts with the image anyway.

    gpt    "Hello!"
    human  "Where is the cup?\n<image>"    ->   Turn("Where is the cup?", "On the table.")
    gpt    "On the table."
    """
    start = int(bool(messages) and messages[0][0] == ASSISTANT)
    dialogue = messages[start:]
    wrong = [i for i, (speaker, _) in enumerate(dialogue) if speaker != (HUMAN, ASSISTANT)[i % 2]]
    if wrong:
        raise DamagedError(f"message {start + wrong[0]} is by the same speaker as the one before")
    positions = [i for i, (_, text) in enumerate(dialogue) for _ in range(text.count(IMAGE))]
    if len(positions) > 1 or any(positions):
        raise DamagedError(
            f"{IMAGE} in messages {positions}, expected it once, in the first question"
        )
    texts = [text.replace(IMAGE, "").strip() if IMAGE in text else text for _, text in dialogue]
    turns = tuple(map(Turn, texts[::2], texts[1::2]))
    if not turns:
        raise DamagedError("a conversation without an answered question")
    check_text(turns[0].question, "the first question")
    return turns, ("the last question has no answer",) * (len(texts) % 2)
