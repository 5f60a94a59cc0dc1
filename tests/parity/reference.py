"""A file of reference outputs (MODEL_GOLDENS format) -> the folders of a released checkpoint.

Every weight is a formula of its name, so that the folders are written from names and shapes alone,
and go through the same loader as a released checkpoint.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from pixellm_jax.weights.torch_folder import write_safetensors

CANVAS = 448


def make_param(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weight of a name: the formula that the reference outputs were made with."""
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
        shape, dtype=np.float32
    )
    if name.endswith("gaussian_matrix"):
        return x
    if len(shape) >= 2:
        return (x / np.sqrt(np.float32(np.prod(shape[1:])))).astype(np.float32)
    if name.endswith("weight"):
        return (1 + 0.1 * x).astype(np.float32)
    return (0.1 * x).astype(np.float32)


def write_folders(file: Any, out: Path) -> tuple[Path, Path]:
    """Writes `out/hf` (PixelLM) and `out/clip` for an open .npz; returns both."""
    config = json.loads(str(file["config"]))
    seed = config["seed"]
    model = {
        str(name): _param(file, str(name), tuple(json.loads(str(shape))), seed)
        for name, shape in zip(file["param_names"], file["param_shapes"], strict=True)
    }
    vision = {
        str(name): make_param(str(name), tuple(json.loads(str(shape))), seed)
        for name, shape in zip(file["clip_param_names"], file["clip_param_shapes"], strict=True)
    }
    hf, clip = out / "hf", out / "clip"
    hf.mkdir(parents=True)
    clip.mkdir()
    write_safetensors(hf / "model.safetensors", model)
    write_safetensors(clip / "model.safetensors", vision)
    settings = {
        "model_type": "llava",
        "architectures": ["PixelLMForCausalLM"],
        "image_feature_scale_num": config["n_scales"],
        "resize_vision_tower_size": CANVAS,
        "pad_train_clip_images": True,
        "mm_vision_select_layer": -2,
        "torch_dtype": "float32",
    }
    (hf / "config.json").write_text(json.dumps({**config["llm"], **settings}))
    (clip / "config.json").write_text(
        json.dumps({**config["clip"], "model_type": "clip_vision_model"})
    )
    seg = config["seg_ids"]
    names = ["[SEG]"] if len(seg) == 1 else [f"[SEG{i}]" for i in range(len(seg))]
    added = dict(zip(names, seg, strict=True))
    added |= {"<im_start>": config["im_start"], "<im_end>": config["im_end"]}
    write_tokenizer(hf, added, config["llm"]["vocab_size"])
    return hf, clip


def write_tokenizer(folder: Path, added: dict[str, int], size: int) -> None:
    """A SentencePiece model of byte and filler pieces below the added tokens."""
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    pieces.normalizer_spec.name = "identity"
    pieces.normalizer_spec.add_dummy_prefix = True
    pieces.normalizer_spec.remove_extra_whitespaces = False
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    for i in range(min(added.values())):
        known = {0: ("<unk>", kind.UNKNOWN), 1: ("<s>", kind.CONTROL), 2: ("</s>", kind.CONTROL)}
        piece, type_ = known.get(i, (f"\u2581w{i}", kind.NORMAL))
        pieces.pieces.add(piece=piece, score=-float(i), type=type_)
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    taken = set(added.values())
    fill = {f"<unused{i}>": i for i in range(min(taken), size) if i not in taken}
    (folder / "added_tokens.json").write_text(json.dumps({**added, **fill}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True})
    )


def _param(file: Any, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if f"param:{name}" in file.files:
        return file[f"param:{name}"].astype(np.float32)
    return make_param(name, shape, seed)
