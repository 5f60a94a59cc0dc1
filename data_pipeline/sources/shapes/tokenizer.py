"""The tokenizer of the shapes: one token per word, and this folder, which holds its files.

A colour and a shape together ("red circle") are one token. A language model that nobody trained
before then need not first learn to put two words together, and what names a target stands right
before its codebook tokens.

Text is put into lower case and punctuation stands apart, so a decoded sentence begins in lower
case. A word that no question or answer has is `<unk>`. There is no codebook in it:
`Vocabulary.with_codebook` appends one of any size.

`python -m data_pipeline.sources.shapes.tokenizer` writes the files again after a change of the
questions; models trained before the change need the old files.
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
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
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
    # No blank before punctuation; WordPiece knows most marks, but not the colon.
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
