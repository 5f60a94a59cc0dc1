"""The tokenizer rule and the codebook, on a small SentencePiece model trained here."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from pixellm_jax.errors import InputError
from pixellm_jax.text.vocabulary import Vocabulary

SENTENCES = [
    "USER: Can you segment the red cup and the plate? ASSISTANT: It is here.",
    "The dog is on the mat, and the cat is in the box.",
    "hello world, one two three four five six",
] * 20


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tokenizer folder as LLaMA's: byte fallback, dummy blank, no added token."""
    folder = tmp_path_factory.mktemp("base")
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
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def vocabulary(base) -> Vocabulary:
    return Vocabulary.with_codebook(base, tokens_per_scale=3, scales=2)


def copy(base: Path, folder: Path, **files: object) -> Path:
    """A copy of the base folder with further JSON files."""
    shutil.copytree(base, folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def pieces(vocabulary: Vocabulary, text: str) -> list[str]:
    names = {index: token for token, index in vocabulary.ids.items()}
    return [names[index] for index in vocabulary.encode(text, bos=False)]


def test_codebook_is_appended_in_order_and_scale_major(vocabulary):
    tokens = [f"[SEG{i}]" for i in range(6)]
    assert list(vocabulary.added) == [*tokens, "<im_start>", "<im_end>"]
    assert list(vocabulary.added.values()) == list(range(397, 405))
    assert vocabulary.codebook == ((397, 398, 399), (400, 401, 402))
    assert vocabulary.group == tuple(range(397, 403))
    assert vocabulary.group_text == " ".join(tokens)
    assert (vocabulary.scales, vocabulary.tokens_per_scale, vocabulary.size) == (2, 3, 405)
    assert (vocabulary.unk, vocabulary.bos, vocabulary.eos, vocabulary.pad) == (0, 1, 2, 0)
    assert tuple(vocabulary.encode(vocabulary.group_text, bos=False)) == vocabulary.group


def test_one_token_has_no_number(base):
    vocabulary = Vocabulary.with_codebook(base, tokens_per_scale=1, scales=1)
    assert (vocabulary.group_text, vocabulary.group, vocabulary.im_start) == ("[SEG]", (397,), 398)


def test_existing_tokens_keep_their_ids(base, tmp_path):
    added = {"<im_patch>": 397, "<im_start>": 398, "<im_end>": 399, "<pad>": 400}
    folder = copy(base, tmp_path / "llava", added_tokens=added)
    vocabulary = Vocabulary.with_codebook(folder, tokens_per_scale=2, scales=1)
    assert (vocabulary.im_start, vocabulary.im_end, vocabulary.group) == (398, 399, (401, 402))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is [SEG0]  [SEG1].", ["▁It", "▁is", "[SEG0]", "[SEG1]", "▁", "."]),
        ("\n[SEG0] \t dog", ["[SEG0]", "▁dog"]),
        ("<im_end>\nthe cup", ["<im_end>", "▁the", "▁cup"]),
        ("[SEG0]\u3000</s>", ["[SEG0]", "</s>"]),
        (" ", None),
        ("", []),
        ("<unk>", ["<unk>"]),
        ("[SEG6]</s>", None),
    ],
)
def test_white_space_around_added_tokens(vocabulary, text, expected):
    found = pieces(vocabulary, text)
    if expected is None:
        assert found and not any(token in found for token in vocabulary.added)
    else:
        assert found == expected


def test_special_tokens_keep_white_space(vocabulary):
    assert pieces(vocabulary, "dog </s> cat")[:3] == ["▁dog", "▁", "</s>"]
    assert pieces(vocabulary, "dog</s>cat")[1] == "</s>"
    glued, apart = pieces(vocabulary, "</s>cat"), pieces(vocabulary, "</s> cat")
    assert glued != apart


def test_special_token_written_as_plain_string_swallows_white_space(base, tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    folder = copy(base, tmp_path / "plain", special_tokens_map=names)
    vocabulary = Vocabulary.with_codebook(folder, tokens_per_scale=3, scales=2)
    assert pieces(vocabulary, "dog </s> cat") == pieces(vocabulary, "dog</s>cat")
    assert pieces(vocabulary, "dog <unk> cat") != pieces(vocabulary, "dog<unk>cat")


def test_without_legacy_only_the_beginning_gets_a_dummy_blank(base, tmp_path):
    folder = copy(base, tmp_path / "modern", tokenizer_config={"legacy": False})
    vocabulary = Vocabulary.with_codebook(folder, tokens_per_scale=3, scales=2)
    assert pieces(vocabulary, "It is [SEG0].") == ["▁It", "▁is", "[SEG0]", "."]


def test_longest_token_wins(base):
    vocabulary = Vocabulary.with_codebook(base, tokens_per_scale=6, scales=2)
    assert pieces(vocabulary, "[SEG1][SEG11][SEG10]") == ["[SEG1]", "[SEG11]", "[SEG10]"]


def test_parts_keep_the_ids_of_the_whole(vocabulary):
    parts = ["USER: the", " dog [SE", "G0] cat", "", " ASSISTANT:", " [SEG1] It is</s>", " end"]
    ids, owners = vocabulary.encode_parts(parts)
    assert ids == vocabulary.encode("".join(parts), bos=False)
    assert owners == sorted(owners) and len(owners) == len(ids)
    names = {index: token for token, index in vocabulary.ids.items()}
    found = [[names[i] for i, o in zip(ids, owners, strict=True) if o == n] for n in range(7)]
    assert found[1][-1] == "[SEG0]" and found[3] == []
    assert found[5] == ["[SEG1]", "▁It", "▁is", "</s>"]


@pytest.mark.parametrize(
    "text",
    ["It is a dog.", "ünïcode 🐘 日本", " two  blanks ", "line\nbreak", "[SEG6] {seg}", "<im_"],
)
def test_decode_inverts_encode(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text, bos=False)) == text


def test_decode_puts_blanks_around_added_tokens(vocabulary):
    ids = vocabulary.encode("It is [SEG0][SEG1]. </s>")
    assert vocabulary.decode(ids) == "<s>It is [SEG0] [SEG1]  . </s>"
    assert vocabulary.decode(ids, skip_special=True) == "It is [SEG0] [SEG1] . "
    with pytest.raises(ValueError, match=r"ids \[-200, 405\] are outside the vocabulary of 405"):
        vocabulary.decode([1, -200, 405])


def test_long_text_takes_linear_time(vocabulary):
    def seconds(count: int) -> float:
        begin = time.perf_counter()
        vocabulary.encode("the red cup [SEG0] is\n </s> here. " * count)
        return time.perf_counter() - begin

    seconds(1000)
    short, long = min(seconds(1000) for _ in range(3)), min(seconds(10_000) for _ in range(3))
    assert long < 40 * short  # quadratic: 100


def test_save_and_load(vocabulary, base, tmp_path):
    vocabulary.save(tmp_path / "saved")
    loaded = Vocabulary.load(tmp_path / "saved", scales=2)
    text = "It is [SEG0] [SEG1]. </s> ok"
    for other in (loaded, pickle.loads(pickle.dumps(vocabulary))):
        assert dict(other.added) == dict(vocabulary.added)
        assert other.codebook == vocabulary.codebook
        assert other.encode(text) == vocabulary.encode(text)
    loaded.save(tmp_path / "saved")  # on to itself
    assert Vocabulary.load(tmp_path / "saved", scales=3).codebook[2] == (401, 402)


def test_transformers_reads_what_save_writes(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary.size
    tokens = list(vocabulary.added)
    assert tokenizer.convert_tokens_to_ids(tokens) == [vocabulary.ids[token] for token in tokens]


def test_added_tokens_may_stand_in_the_config(base, tmp_path):
    tokens = ["[SEG0]", "[SEG1]", "<im_start>", "<im_end>"]
    decoder = {"1": {"content": "<s>"}} | {
        str(397 + i): {"content": token} for i, token in enumerate(tokens)
    }
    config = {"added_tokens_decoder": decoder}
    vocabulary = Vocabulary.load(copy(base, tmp_path / "c", tokenizer_config=config), scales=2)
    assert vocabulary.codebook == ((397,), (398,)) and list(vocabulary.added) == tokens
    assert pieces(vocabulary, "dog <s> [SEG1] cat")[1:] == ["▁", "<s>", "[SEG1]", "▁cat"]


def word_level(folder: Path, tokens: list[str]) -> Path:
    words = ["<unk>", "<s>", "</s>", "It", "is", "the", "dog", ".", "USER", "ASSISTANT", ":"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.add_tokens(tokens)
    tokenizer.enable_truncation(4)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_words_of_a_tokenizer_json(tmp_path):
    folder = word_level(tmp_path / "words", ["[SEG0]", "[SEG1]", "<im_start>", "<im_end>"])
    vocabulary = Vocabulary.load(folder, scales=2)
    assert (vocabulary.size, vocabulary.codebook) == (15, ((11,), (12,)))
    assert vocabulary.encode("It is [SEG0] [SEG1]. It is the dog.</s>") == [
        *(1, 3, 4, 11, 12, 7),
        *(3, 4, 5, 6, 7, 2),
    ]
    ids, owners = vocabulary.encode_parts(["USER: dog ASSISTANT:", " It is</s>"])
    assert (ids, owners) == ([8, 10, 6, 9, 10, 3, 4, 2], [0] * 5 + [1] * 3)
    assert vocabulary.decode([3, 4, 11, 12]) == "It is [SEG0] [SEG1]"


def test_codebook_on_a_tokenizer_json(tmp_path):
    folder = word_level(tmp_path / "words", [])
    vocabulary = Vocabulary.with_codebook(folder, tokens_per_scale=1, scales=2)
    vocabulary.save(tmp_path / "saved")
    loaded = Vocabulary.load(tmp_path / "saved", scales=2)
    assert loaded.codebook == ((11,), (12,)) and loaded.size == 15


def test_input_errors_name_folder_and_tokens(base, vocabulary, tmp_path):
    with pytest.raises(InputError, match=r"base.*no token <im_start>, <im_end>, \[SEG\];"):
        Vocabulary.load(base, scales=2)
    with pytest.raises(InputError, match="neither tokenizer.model nor tokenizer.json"):
        Vocabulary.load(tmp_path, scales=2)
    vocabulary.save(tmp_path / "six")
    with pytest.raises(InputError, match=r"6 codebook tokens .* multiple of 4 scales"):
        Vocabulary.load(tmp_path / "six", scales=4)
    with pytest.raises(InputError, match=r"\[SEG5\], expected 4 tokens"):
        Vocabulary.with_codebook(tmp_path / "six", tokens_per_scale=2, scales=2)
    gap = {"[SEG0]": 397, "[SEG2]": 398, "<im_start>": 399, "<im_end>": 400}
    with pytest.raises(InputError, match=r"no token \[SEG1\];"):
        Vocabulary.load(copy(base, tmp_path / "gap", added_tokens=gap), scales=1)
    clash = {"added_tokens_decoder": {"398": {"content": "[SEG0]"}}}
    folder = copy(base, tmp_path / "clash", added_tokens=gap, tokenizer_config=clash)
    with pytest.raises(InputError, match=r"clash: token \[SEG0\] has the ids 397 and 398"):
        Vocabulary.load(folder, scales=1)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "added_tokens.json"])
def test_damaged_file(base, tmp_path, name):
    folder = copy(base, tmp_path / "damaged")
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    (folder / name).write_text("{")
    with pytest.raises(InputError, match="damaged.*copy"):
        Vocabulary.load(folder, scales=2)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"[SEG0]": "397"}},
        {"added_tokens": {"[SEG0]": 397.5}},
        {"added_tokens": {"[SEG0]": -1}},
        {"added_tokens": {"[SEG0]": True}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "[SEG0]"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"397": {}}}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": None}},
        {"special_tokens_map": {"bos_token": ["<s>"]}},
        {"special_tokens_map": {"bos_token": {}, "eos_token": {"text": "</s>"}}},
    ],
)
def test_files_of_the_wrong_form(base, tmp_path, files):
    with pytest.raises(InputError, match="wrong: .*copy it again"):
        Vocabulary.with_codebook(
            copy(base, tmp_path / "wrong", **files), tokens_per_scale=1, scales=1
        )


def test_tokens_that_share_an_id(base, tmp_path):
    added = {"[SEG0]": 397, "[SEG1]": 397, "<im_start>": 399, "<im_end>": 400}
    with pytest.raises(InputError, match=r"share an id .*\[SEG0\] 397, \[SEG1\] 397"):
        Vocabulary.load(copy(base, tmp_path / "shared", added_tokens=added), scales=1)
