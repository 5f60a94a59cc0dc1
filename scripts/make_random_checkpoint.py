"""Write PyTorch folders of a PixelLM with random weights: OUT/hf and OUT/clip.

    python scripts/make_random_checkpoint.py --out tiny
    pixellm convert --hf tiny/hf --vision tiny/clip --out tiny/jax

The tiny model answers every question with "It is [SEG].": its head maps each token of that answer
to the next. All other weights are noise, so its masks mean nothing. `--size 7b` writes the shapes
of the released model, about 13.5 GB, to test converting at full size. `--llava` writes a LLaVA
instead, for `pixellm convert --from-llava`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import sentencepiece

from pixellm_jax.config import (
    SIZES,
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_folder
from pixellm_jax.text.prompt import LLAVA_V1, question_ids
from pixellm_jax.text.vocabulary import IM_END, IM_START, Vocabulary
from pixellm_jax.weights import torch_layout
from pixellm_jax.weights.torch_config import OWN_KEY, hf_model, hf_vision
from pixellm_jax.weights.torch_folder import write_safetensors

ANSWER = "It is {group}."
SENTENCES = [LLAVA_V1.opening, "It is . USER: ASSISTANT: Please segment the dog in this image."]
SHARD_BYTES = 2 << 30

LLAVA_TOKENS = ("<im_patch>", IM_START, IM_END)
"""Tokens that LLaVA v1 adds to the LLaMA tokenizer; other versions add none, or others."""

LLAVA_KEYS = {
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "max_position_embeddings", "tie_word_embeddings", "torch_dtype"),
    *("mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"),
}


def tiny(tokens_per_scale: int = 3, scales: int = 2) -> ModelConfig:
    """Return a config of under a million parameters that has every part; up to three scales."""
    return ModelConfig(
        vision=VisionConfig(
            width=32, layers=18, heads=4, mlp=64, canvas=112, table=6, taps=(-2, -11, -17)[:scales]
        ),
        language=LanguageConfig(
            vocabulary=1,
            width=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head=16,
            mlp=96,
            max_positions=2048,
        ),
        codebook=CodebookConfig(tokens_per_scale=tokens_per_scale, scales=scales),
        decoder=DecoderConfig(width=32, heads=4, mlp=64),
        image_grid=4,
        dtype="float32",
    )


def write(out: Path, config: ModelConfig, *, dtype: str = "float32", seed: int = 0) -> ModelConfig:
    """Write both folders; return the config with its vocabulary size filled in."""
    model, vision = _folders(out)
    vocabulary = write_tokenizer(model, config)
    config = _with_rows(config, max(config.language.vocabulary, vocabulary.size))
    for folder, source in ((model, torch_layout.MODEL), (vision, torch_layout.VISION)):
        shards = _shards(_shapes(config, source), dtype, seed)
        wired = source == torch_layout.MODEL and config.language.width == 64
        _write_weights(folder, (_wire(s, vocabulary, config) if wired else s for s in shards))
    settings = hf_model(config)
    if config.image_grid == ModelConfig().image_grid:
        settings.pop(OWN_KEY)
    _write_configs(out, settings, config)
    return config


def write_llava(
    out: Path,
    config: ModelConfig,
    *,
    added: Sequence[str] = LLAVA_TOKENS,
    dtype: str = "float32",
    seed: int = 0,
) -> ModelConfig:
    """Write the folders of a LLaVA with the language model of `config`, and of its CLIP.

    The LLaVA has a linear projector and the tokens `added`, but no part that only PixelLM has.
    """
    model, vision = _folders(out)
    count = write_pieces(model)
    tokens = {token: count + i for i, token in enumerate(added)}
    (model / "added_tokens.json").write_text(json.dumps(tokens))
    config = _with_rows(config, max(config.language.vocabulary, count + len(added)))
    d = config.language.width
    e = config.vision.width
    shapes = {"model.mm_projector.weight": (d, e), "model.mm_projector.bias": (d,)}
    shapes |= {
        name: entry.torch
        for entry in torch_layout.table(config, kind="required")
        if entry.path.startswith("language_model.")
        for name in entry.names
    }
    _write_weights(model, _shards(shapes, dtype, seed))
    _write_weights(vision, _shards(_shapes(config, torch_layout.VISION), dtype, seed))
    settings = {key: value for key, value in hf_model(config).items() if key in LLAVA_KEYS}
    settings["architectures"] = ["LlavaLlamaForCausalLM"]
    settings["mm_use_im_start_end"] = IM_START in added
    settings["torch_dtype"] = np.dtype(dtype).name
    _write_configs(out, settings, config)
    return config


def write_tokenizer(folder: Path, config: ModelConfig) -> Vocabulary:
    """Write a small tokenizer with the codebook tokens."""
    write_pieces(folder)
    codebook = config.codebook
    vocabulary = Vocabulary.with_codebook(
        folder, tokens_per_scale=codebook.tokens_per_scale, scales=codebook.scales
    )
    vocabulary.save(folder)
    return vocabulary


def write_pieces(folder: Path) -> int:
    """Train a small SentencePiece model; return the number of its pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 8),
        model_writer=trained,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    return pieces.get_piece_size()


def _folders(out: Path) -> tuple[Path, Path]:
    folders = out / "hf", out / "clip"
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def _with_rows(config: ModelConfig, rows: int) -> ModelConfig:
    language = dataclasses.replace(config.language, vocabulary=rows)
    return dataclasses.replace(config, language=language)


def _write_weights(folder: Path, shards: Iterable[dict[str, np.ndarray]]) -> None:
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}.safetensors"
        write_safetensors(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _write_configs(out: Path, settings: dict[str, Any], config: ModelConfig) -> None:
    vision = hf_vision(config.vision)
    (out / "hf" / "config.json").write_text(json.dumps(settings, indent=2))
    (out / "clip" / "config.json").write_text(json.dumps(vision, indent=2))


def _shapes(config: ModelConfig, source: str) -> dict[str, tuple[int, ...]]:
    return {
        name: entry.torch
        for entry in torch_layout.table(config, source=source)
        if entry.kind != "optional"
        for name in entry.names
    }


def _shards(
    shapes: dict[str, tuple[int, ...]], dtype: str, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        kept = np.float32 if ".mask_decoder." in name or ".prompt_encoder." in name else dtype
        shard[name] = _initialise(name, shape, seed).astype(kept)
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    yield shard


def _initialise(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Initialise by name and seed: norms near 1, biases near 0, other weights scaled by fan-in."""
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
        shape, dtype=np.float32
    )
    if len(shape) == 1:
        return np.float32(name.endswith("weight")) + 0.1 * x
    if name.endswith("gaussian_matrix") or "embed" in name:
        return x
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def _wire(
    shard: dict[str, np.ndarray], vocabulary: Vocabulary, config: ModelConfig
) -> dict[str, np.ndarray]:
    """Make `ANSWER` the most likely continuation of every prompt.

    The layers contribute next to nothing, so the last hidden state is the embedding of the last
    token; the head's row of each answer token is the embedding of the token before it.
    """
    answer = vocabulary.encode(ANSWER.format(group=vocabulary.group_text), bos=False)
    prompt = question_ids(vocabulary, LLAVA_V1, "?", image_tokens=config.image_tokens)
    chain = [int(prompt[-1]), *answer, vocabulary.eos]
    if len(set(chain)) != len(chain):
        raise ValueError(f"a token occurs twice in the chain {chain}")
    for name, array in shard.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            array *= 1e-3
    head = shard["lm_head.weight"]
    embedding = shard["model.embed_tokens.weight"]
    head *= 1e-2
    for before, after in zip(chain, chain[1:], strict=False):
        head[after] = embedding[before]
    return shard


def main() -> None:
    """Parse the command line and write the folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--llava", action="store_true", help="write a LLaVA instead of a PixelLM")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        with whole_folder(options.out) as folder:
            make = write_llava if options.llava else write
            if options.size == "tiny":
                make(folder, tiny(), seed=options.seed)
            else:
                make(folder, SIZES[options.size], dtype=ml_dtypes.bfloat16, seed=options.seed)
    except InputError as error:
        sys.exit(str(error))
    print(f"{options.out / 'hf'} and {options.out / 'clip'}")


if __name__ == "__main__":
    main()
