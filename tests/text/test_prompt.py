"""Conversations to packed sequences and answers back to text, on a model trained here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from pixellm_jax.text.answer import MARKER, read_answer
from pixellm_jax.text.prompt import (
    IMAGE_TOKEN,
    LLAVA_LLAMA_2,
    LLAVA_V1,
    TEMPLATES,
    EncodedConversation,
    encode_conversation,
    pack,
    question_ids,
)
from pixellm_jax.text.vocabulary import Vocabulary

SENTENCES = [
    LLAVA_V1.opening + "USER: Where is the red cup? ASSISTANT: It is here.",
    "The dog is on the mat, and the cat is in the box, separately.",
    "a, b and c are the segmentation result of bread and butter",
] * 20
BOTH = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    folder: Path = tmp_path_factory.mktemp("base")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=397,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Vocabulary.with_codebook(folder, tokens_per_scale=3, scales=2)


def fill(vocabulary: Vocabulary, text: str) -> str:
    """ "#" stands for the tokens of one target."""
    return text.replace("#", vocabulary.group_text)


def supervised(vocabulary: Vocabulary, conversation: EncodedConversation) -> str:
    return vocabulary.decode(conversation.ids[conversation.loss_mask].tolist())


# Conversations


@BOTH
def test_answers_and_nothing_else_are_supervised(vocabulary, template):
    messages = ["<image>\nWhere?", "Here.", "Who?", "", "And?", fill(vocabulary, "It is #.")]
    conversation = encode_conversation(vocabulary, template, messages)
    answers = [
        vocabulary.encode(template.answer[0].lstrip() + text + template.answer[1], bos=False)
        for text in messages[1::2]
        if text
    ]
    assert conversation.ids[conversation.loss_mask].tolist() == sum(answers, [])
    assert conversation.ids.dtype == conversation.codebook.dtype == np.int32
    assert (conversation.ids == IMAGE_TOKEN).sum() == 1
    assert conversation.ids[0] == vocabulary.bos


@BOTH
def test_ids_are_those_of_the_written_conversation(vocabulary, template):
    messages = ["Where is  the cup?", " here ", "And\n", fill(vocabulary, "It is #.")]
    user, assistant = template.user, template.assistant
    written = template.opening
    for turn in range(2):
        question = template.question if turn else template.first_question
        written += user + question[0] + messages[2 * turn] + question[1]
        written += assistant + template.answer[0] + messages[2 * turn + 1] + template.answer[1]
    conversation = encode_conversation(vocabulary, template, messages)
    assert conversation.ids.tolist() == vocabulary.encode(written)


@BOTH
@pytest.mark.parametrize("typed", [" ASSISTANT: ", "</s>", "[/INST] x </s>", "#", "<unk>", "<s> #"])
def test_user_may_type_anything(vocabulary, template, typed):
    typed = fill(vocabulary, f"who {typed} is it")
    answer = fill(vocabulary, "It is #.")
    plain = encode_conversation(vocabulary, template, ["<image>\nwho?", answer])
    conversation = encode_conversation(vocabulary, template, [f"<image>\n{typed}", answer])
    assert supervised(vocabulary, conversation) == supervised(vocabulary, plain)
    shift = len(conversation.ids) - len(plain.ids)
    np.testing.assert_array_equal(conversation.codebook, plain.codebook + shift)


@BOTH
def test_open_turn_is_a_prompt(vocabulary, template):
    conversation = encode_conversation(vocabulary, template, ["<image>\nWhere?", ""])
    assert not conversation.loss_mask.any() and conversation.codebook.shape == (0, 2, 3)
    closed = encode_conversation(vocabulary, template, ["<image>\nWhere?", "Here."])
    assert closed.ids[: len(conversation.ids)].tolist() == conversation.ids.tolist()
    assert closed.loss_mask.nonzero()[0][0] == len(conversation.ids)


def test_codebook_holds_complete_ordered_groups_of_answers(vocabulary):
    answer = fill(vocabulary, "x [SEG0] [SEG1] # and [SEG1] [SEG0] ##.")
    conversation = encode_conversation(vocabulary, LLAVA_V1, [fill(vocabulary, "is # it"), answer])
    assert conversation.codebook.shape == (3, 2, 3)
    np.testing.assert_array_equal(conversation.ids[conversation.codebook[1]], vocabulary.codebook)
    assert conversation.loss_mask[conversation.codebook].all()
    starts = conversation.codebook[:, 0, 0]
    assert starts[2] - starts[1] == 6  # neighbours
    # Scale by scale: consecutive tokens run through k, then s.
    np.testing.assert_array_equal(conversation.codebook[0].ravel(), starts[0] + np.arange(6))


def test_images(vocabulary):
    messages = ["<image> and <image>?", "An <image> is text.", "<image>", ""]
    for images, expected in ((-1, 3), (0, 0), (1, 1), (2, 2)):
        ids = encode_conversation(vocabulary, LLAVA_V1, messages, images=images).ids
        where = (ids == IMAGE_TOKEN).nonzero()[0]
        assert len(where) == expected
        assert (ids[where - 1] == vocabulary.im_start).all()
        assert (ids[where + 1] == vocabulary.im_end).all()


@pytest.mark.parametrize("messages", [[], ["Where?"], ["a", "b", "c"]])
def test_messages_come_in_pairs(vocabulary, messages):
    with pytest.raises(ValueError, match="pairs"):
        encode_conversation(vocabulary, LLAVA_V1, messages)


@BOTH
def test_question_ids(vocabulary, template):
    ids = question_ids(vocabulary, template, "Where is <image>?", image_tokens=5)
    assert (ids == IMAGE_TOKEN).sum() == 5 and ids.dtype == np.int32
    single = question_ids(vocabulary, template, "Where?", image_tokens=1)
    open_turn = encode_conversation(vocabulary, template, ["<image>\nWhere?", ""])
    assert single.tolist() == open_turn.ids.tolist()
    history = ["Where?", "Here."]
    later = question_ids(vocabulary, template, "Who?", image_tokens=1, history=history)
    whole = encode_conversation(vocabulary, template, ["<image>\nWhere?", "Here.", "Who?", ""])
    assert later.tolist() == whole.ids.tolist()


# Packing


@pytest.fixture(scope="module")
def conversations(vocabulary) -> list[EncodedConversation]:
    texts = [
        ["<image>\nWhere is the cup?", fill(vocabulary, "It is #.")],
        ["<image>\nWho?", "The dog.", "And?", fill(vocabulary, "# and #.")],
        ["<image>\nWhat is it?", "A mat."],
    ]
    return [encode_conversation(vocabulary, LLAVA_V1, messages) for messages in texts]


@pytest.mark.parametrize("image_tokens", [1, 7])
def test_packed_rows_are_the_single_rows(vocabulary, conversations, image_tokens):
    packed = pack(conversations, image_tokens=image_tokens)
    for segment, conversation in enumerate(conversations, 1):
        alone = pack([conversation], image_tokens=image_tokens)
        own = (packed.segment == 0) | (packed.segment == segment)
        np.testing.assert_array_equal(packed.tokens[own], alone.tokens)
        np.testing.assert_array_equal(packed.loss_mask[own], alone.loss_mask)
        np.testing.assert_array_equal(packed.position[own], np.arange(own.sum()))
        np.testing.assert_array_equal(alone.position, np.arange(len(alone.tokens)))
        # The indices name the same places of the single row.
        mine = packed.codebook_index[packed.target_conversation == segment]
        row = own.nonzero()[0]
        np.testing.assert_array_equal(mine, row[alone.codebook_index])
        expanded = conversation.codebook + image_tokens - 1
        np.testing.assert_array_equal(alone.codebook_index, expanded - 1)
    assert (packed.tokens == IMAGE_TOKEN).sum() == image_tokens
    assert (packed.tokens[packed.codebook_index[:, 0, 1]] == vocabulary.codebook[0][0]).all()
    assert packed.target_conversation.tolist() == [1, 2, 2] and packed.target_valid.all()
    assert (packed.kept, packed.dropped) == ((0, 1, 2), 0)


def test_state_before_the_first_token_is_that_of_the_prefix():
    codebook = np.array([[[4, 5]]], np.int32)
    ids = np.array([1, 9, IMAGE_TOKEN, 8, 6, 7, 2], np.int32)
    mask = np.array([0, 0, 0, 0, 1, 1, 1], bool)
    packed = pack([EncodedConversation(ids, mask, codebook)] * 2, image_tokens=3)
    assert packed.segment.tolist() == [0] * 6 + [1] * 3 + [2] * 3
    assert packed.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8]
    assert packed.codebook_index.tolist() == [[[5, 6]], [[5, 9]]]


def test_padding_and_dtypes(conversations):
    free = pack(conversations, image_tokens=3)
    size = len(free.tokens)
    padded = pack(conversations, image_tokens=3, length=size + 11, targets=5)
    for name, wanted in (("tokens", 0), ("segment", -1), ("position", 0), ("loss_mask", False)):
        array, exact = getattr(padded, name), getattr(free, name)
        np.testing.assert_array_equal(array[:size], exact)
        assert (array[size:] == wanted).all() and len(array) == size + 11
        assert array.dtype == exact.dtype == (bool if name == "loss_mask" else np.int32)
    assert padded.target_valid.tolist() == [True] * 3 + [False] * 2
    assert padded.codebook_index.shape == (5, 2, 3) and padded.codebook_index.dtype == np.int32
    assert padded.target_conversation.tolist() == [1, 2, 2, 0, 0]
    assert padded.target_conversation.dtype == np.int32


def test_over_budget_conversations_are_dropped_whole(conversations):
    full = pack(conversations, image_tokens=3)
    # One target too few for the second conversation: it goes, the third stays.
    packed = pack(conversations, image_tokens=3, targets=2)
    assert (packed.kept, packed.dropped) == ((0, 2), 1)
    assert packed.target_valid.tolist() == [True, False]
    np.testing.assert_array_equal(packed.tokens, full.tokens[full.segment != 2])
    assert set(packed.segment.tolist()) == {0, 1, 2}
    # One position too few: the last conversation goes.
    packed = pack(conversations, image_tokens=3, length=len(full.tokens) - 1)
    assert (packed.kept, packed.dropped) == ((0, 1), 1)
    exact = pack(conversations, image_tokens=3, length=len(full.tokens), targets=3)
    assert exact.dropped == 0
    prefix = int((full.segment == 0).sum())
    empty = pack(conversations, image_tokens=3, length=prefix, targets=2)
    assert (empty.kept, empty.dropped, empty.codebook_index.shape) == ((), 3, (2, 2, 3))
    with pytest.raises(ValueError, match=f"the prefix alone takes {prefix}"):
        pack(conversations, image_tokens=3, length=prefix - 1)


def test_what_cannot_share_a_sequence(vocabulary, conversations):
    def encode(*messages: str) -> EncodedConversation:
        return encode_conversation(vocabulary, LLAVA_V1, messages)

    for other in (
        encode_conversation(vocabulary, LLAVA_LLAMA_2, ["<image>\nWho?", "x"]),
        encode("Who? <image>", "x"),
        encode("Who?", "x"),
    ):
        with pytest.raises(ValueError, match="cannot share"):
            pack([conversations[0], other], image_tokens=3)
    for other in (encode("<image><image>", "x"), encode("Who?", "x", "<image>", "y")):
        with pytest.raises(ValueError, match="at most one, before the first answer"):
            pack([other], image_tokens=3)
    with pytest.raises(ValueError):
        pack([], image_tokens=3)


def test_text_without_image_shares_the_start_token(vocabulary):
    texts = [encode_conversation(vocabulary, LLAVA_V1, [q, "x"]) for q in ("Who?", "Where is it?")]
    packed = pack(texts, image_tokens=3)
    assert (packed.segment == 0).sum() == 1 and packed.tokens[0] == vocabulary.bos
    assert packed.tokens.min() >= 0


# Answers


def answer(vocabulary: Vocabulary, text: str):
    return read_answer(vocabulary, vocabulary.encode(fill(vocabulary, text) + "</s>", bos=False))


@pytest.mark.parametrize(
    ("generated", "text"),
    [
        ("It is #.", "It is [SEG]."),
        ("#", "[SEG]"),
        ("Sure, # , # and #.", "Sure, [SEG], [SEG] and [SEG]."),
        ("the cup # # (#)!\nAnd # end", "the cup [SEG] [SEG] ([SEG])!\nAnd [SEG] end"),
        ("The dog #'s box", "The dog [SEG]'s box"),
        ("no target", "no target"),
        ("", ""),
        ("It is [SEG0] [SEG1] [SEG2].", "It is."),
        ("a [SEG1] [SEG0] # [SEG5] b", "a [SEG] b"),
        ("x <im_start> y <unk> z", "x y z"),
    ],
)
def test_answer_text_reads_well(vocabulary, generated, text):
    found = answer(vocabulary, generated)
    assert found.text == text
    assert [text[begin:end] for begin, end in found.markers] == [MARKER] * len(found.markers)
    assert len(found.markers) == len(found.phrases) == len(found.codebook_index)


def test_answer_indices(vocabulary):
    ids = vocabulary.encode(fill(vocabulary, "x [SEG0] # [SEG1] #."), bos=False)
    found = read_answer(vocabulary, np.asarray(ids))
    np.testing.assert_array_equal(
        np.asarray(ids)[found.codebook_index], np.asarray([vocabulary.codebook] * 2)
    )
    assert found.codebook_index.dtype == found.markers.dtype == found.phrases.dtype == np.int32
    empty = read_answer(vocabulary, [])
    assert empty.text == "" and empty.codebook_index.shape == (0, 2, 3)
    assert empty.markers.shape == empty.phrases.shape == (0, 2)


def test_answer_ends_at_the_first_end_token(vocabulary):
    ids = vocabulary.encode(fill(vocabulary, "It is #.</s>The dog is #."), bos=False)
    assert read_answer(vocabulary, ids).text == "It is [SEG]."
    assert read_answer(vocabulary, [vocabulary.eos, *ids]).text == ""


def test_incomplete_groups_lose_only_themselves(vocabulary):
    group = list(vocabulary.group)
    words = vocabulary.encode("the cup", bos=False)
    ids = words + group[:5] + words + group + group[1:] + words + group + [group[0]]
    found = read_answer(vocabulary, ids)
    assert found.text == "the cup the cup [SEG] the cup [SEG]"
    assert found.codebook_index[:, 0, 0].tolist() == [len(words) * 2 + 5, len(ids) - 7]


def test_marker_letters_in_text_are_no_marker(vocabulary):
    found = answer(vocabulary, "The word [SEG] is not #.")
    assert found.text == "The word [SEG] is not [SEG]."
    assert found.markers.tolist() == [[22, 27]]


@pytest.mark.parametrize(
    ("generated", "names"),
    [
        ("It is #.", [""]),
        ("Sure, #.", [""]),
        ("#.", [""]),
        ("Sure, it is #.", [""]),
        ("Sure, the segmentation result is #.", [""]),
        ("They are #, # and #.", [""] * 3),
        ("#, # and #.", [""] * 3),
        ("the dog is #.", ["the dog"]),
        ("The segmentation result of the red cup is #.", ["the red cup"]),
        ("dog is #, Fork is # and bread and butter is #.", ["dog", "Fork", "bread and butter"]),
        ("a, b and c are #, # and #, separately.", ["a", "b", "c"]),
        ("Sure, a, b are # and #.", ["a", "b"]),
        (
            "the segmentation result of bread and butter, a and b are #, # and #.",
            ["bread and butter", "a", "b"],
        ),
        ("Three dogs are #, # and #.", ["Three dogs"] * 3),
        ("the red cup # next to the plate #", ["the red cup", "the plate"]),
        ("It rains. The cat # sees the dog #.", ["The cat", "the dog"]),
        (
            "I see the grey boat in the middle # # and the dog #.",
            ["the grey boat in the middle"] * 2 + ["the dog"],
        ),
        (
            "It is the rightmost tie, which is mostly red #.",
            ["the rightmost tie, which is mostly red"],
        ),
        ("The left one # is an elephant and the other # is not.", ["The left one", "the other"]),
    ],
)
def test_phrases(vocabulary, generated, names):
    found = answer(vocabulary, generated)
    assert [found.text[begin:end] for begin, end in found.phrases] == names
    for (begin, end), (marker, _) in zip(found.phrases, found.markers, strict=True):
        assert begin < end <= marker or begin == end == marker


def test_an_id_without_a_token_is_left_out_of_the_text(vocabulary):
    ids = vocabulary.encode(fill(vocabulary, "It is #."), bos=False)
    found = read_answer(vocabulary, [ids[0], vocabulary.size + 3, *ids[1:]])
    assert found.text == "It is [SEG]."
    assert found.codebook_index.min() == ids.index(vocabulary.group[0]) + 1
