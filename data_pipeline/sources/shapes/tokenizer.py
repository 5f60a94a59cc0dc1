"""Word-level tokenizer of the shapes dataset; its files are in `FOLDER`.

A pair of colour and shape ("red circle") is one token, so that a language model trained from
scratch does not have to learn to combine two words first, and the name of a target directly
precedes its codebook tokens.

Text is lower-cased and split at punctuation, so a decoded sentence starts in lower case. A word
that occurs in no question or answer is `<unk>`. The files contain no segmentation codebook:
`Vocabulary.with_codebook` appends one of any size.

After a change of the questions, run `python -m data_pipeline.sources.shapes.tokenizer` to write the
files again; models trained before the change need the old files.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_pipeline.sources.shapes.phrases import words
from data_pipeline.sources.shapes.scene import COLOURS, SHAPES
from pixellm_jax.text.prompt import PLAIN

FOLDER = Path(__file__).parent / "tokenizer_files"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    labels = [PLAIN.user, PLAIN.assistant]
    labels = [label.removesuffix(":").lower() for label in labels]
    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    tokens = [*SPECIAL.values(), *sorted({*words(), *labels}), *pairs]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    pair = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{pair}|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    # No space before punctuation: WordPiece cleans up most marks, but not the colon.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
    )
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    write(FOLDER)
