"""StableHLO export: a model as serialised programs with weights, and a runner without model code.

    OUT/manifest.json      everything that a runner must know (see `_manifest`)
    OUT/programs/*.jax     output of `jax.export`: StableHLO of a function, for fixed shapes
    OUT/weights            every weight once, as safetensors; programs take them as arguments
    OUT/tokenizer          as in a checkpoint
    OUT/run.py             a copy of `stablehlo_runner.py`

The programs are the functions of `decoding.py`, so the answers are the same as the engine's:

    encode_bB        images -> image tokens and feature maps
    prefill_bB_tT    image tokens and prompts of up to T tokens after the image -> decode state
    decode_bB_tT     decode state after up to `steps` steps; jump-forward decoding of targets
    plain_bB_tT      the same, with one step per token
    masks_mM         states and feature maps of M targets -> mask logits
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export  # not part of `import jax`
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError
from pixellm_jax.files import whole_folder
from pixellm_jax.inference import decoding
from pixellm_jax.inference.prepare import prepare_for_inference
from pixellm_jax.inference.sampling import Sampling
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.text.prompt import IMAGE_TOKEN, TEMPLATES, prefix_length, question_ids
from pixellm_jax.text.tokenizer import SentencePieceEncoder
from pixellm_jax.text.vocabulary import IM_END, Vocabulary
from pixellm_jax.weights.export import ExportedTensor, write_shards

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
RUNNER = Path(__file__).with_name("stablehlo_runner.py")
MANIFEST, RUN = "manifest.json", "run.py"
PROGRAMS, WEIGHTS, TOKENIZER = "programs", "weights", "tokenizer"

SPECIAL = ("bos", "eos", "unk", "pad", "im_start", "im_end")
LANGUAGE = ("language_model",)
VISION = ("vision_encoder", "image_projector", "mask_projector", "pixel_decoder")
MASKS = ("codebook", "pixel_decoder")

EXPORTED_NAMES = {
    "prompt_length": "prompt",
    "max_new_tokens": "budget",
    "token_prob": "chance",
    "num_generated": "said",
    "num_cached": "fed",
    "num_steps": "passes",
}
"""Names in the exported programs (format 1) of fields of `DecodeState`, where they differ."""

ROUND = 16
"""The number of positions of the cache is rounded up to a multiple of this."""

Arrays = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes for which programs are exported; a runner pads to the next larger one."""

    batch: tuple[int, ...] = (1,)
    """Questions per batch."""
    question: tuple[int, ...] = (64,)
    """Tokens of a prompt after the image."""
    targets: tuple[int, ...] = (4,)
    """Masks per batch."""
    new_tokens: int = 256
    """Maximum length of an answer in tokens."""

    def __post_init__(self) -> None:
        for name in ("batch", "question", "targets"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
                raise InputError(f"{name}={sizes}: expected rising numbers of at least 1")
        if self.new_tokens < 1:
            raise InputError(f"new_tokens={self.new_tokens}: expected at least 1")


class Program(NamedTuple):
    """A function of a model and named arrays, to be exported.

    Attributes:
        name: file name without suffix.
        sizes: the buckets it belongs to, for the manifest.
        parts: modules of the model whose weights it takes.
        function: maps model and inputs to outputs.
        inputs: shapes and dtypes by name.
    """

    name: str
    sizes: dict[str, int]
    parts: tuple[str, ...]
    function: Callable[[PixelLM, Arrays], Arrays]
    inputs: Arrays


def write_programs(
    model: PixelLM,
    vocabulary: Vocabulary,
    out: Path,
    *,
    buckets: Buckets = Buckets(),
    platforms: Sequence[str] = PLATFORMS,
    progress: Callable[[int, int], None] = lambda new, total: None,
    consume: bool = False,
) -> list[str]:
    """Export a model to the folder `out`; return the names of the programs.

    Args:
        model: with LoRA pairs merged.
        vocabulary: its tokenizer.
        out: a new folder.
        buckets: shapes of the programs.
        platforms: on which the programs can run, a subset of `PLATFORMS`.
        progress: called with the bytes of weights just written and the total.
        consume: as for `prepare_for_inference`.

    Raises:
        InputError: the buckets do not fit the model, JAX does not run on the CPU, or `out` exists
            or cannot be written.
    """
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise InputError(f"platforms {unknown}: choose from {', '.join(PLATFORMS)}")
    if jax.default_backend() != "cpu":
        # On a GPU, attention would be a cuDNN call, which other platforms do not have.
        raise InputError("programs are exported on a CPU: set JAX_PLATFORMS=cpu")
    prefix = _prefix(model.config, vocabulary)
    _check(model.config, buckets, len(prefix))
    model = prepare_for_inference(model, consume=consume)
    tensors = [
        ExportedTensor(name, array.nbytes, partial(np.asarray, array))
        for name, array in name_weights(model).items()
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    with whole_folder(out) as made:
        for name in (PROGRAMS, WEIGHTS):
            (made / name).mkdir()
        vocabulary.save(made / TOKENIZER)
        entries = {}
        for program in programs(model, vocabulary, buckets, len(prefix)):
            file = made / PROGRAMS / f"{program.name}.jax"
            entries[program.name] = _write(program, model, file, platforms)
        write_shards(made / WEIGHTS, tensors, lambda new: progress(new, total))
        manifest = _manifest(model, vocabulary, buckets, prefix, made)
        manifest |= {"platforms": list(platforms), "programs": entries}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (made / MANIFEST).write_text(text, encoding="utf-8")
        shutil.copyfile(RUNNER, made / RUN)
    return list(entries)


def programs(
    model: PixelLM, vocabulary: Vocabulary, buckets: Buckets, prefix: int
) -> Iterator[Program]:
    """Yield all programs; `prefix`: tokens of a prompt up to the one after the image."""
    config = model.config
    side, positions = config.vision.canvas, config.language.max_positions
    shape, stop, group = jax.ShapeDtypeStruct, vocabulary.eos, vocabulary.group
    for b in buckets.batch:
        image = shape((b, side, side, 3), jnp.uint8)
        images = {"image": image, "image_hw": shape((b, 2), jnp.int32)}
        yield Program(f"encode_b{b}", {"batch": b}, VISION, _encode, images)
        encoded = jax.eval_shape(_encode, model, images)
        for t in buckets.question:
            longest = min(prefix + t + buckets.new_tokens, positions) + len(group)
            prompts = {
                "image_tokens": encoded["image_tokens"],
                "image_valid": encoded["image_valid"],
                "tokens": shape((b, prefix + t), jnp.int32),
                **{name: shape((b,), jnp.int32) for name in ("length", "budget")},
                "seed": shape((b,), jnp.uint32),
                "temperature": shape((b,), jnp.float32),
                "top_p": shape((b,), jnp.float32),
            }
            sizes, capacity = {"batch": b, "question": t}, -(-longest // ROUND) * ROUND
            read = partial(_read, prefix=prefix, room=buckets.new_tokens, capacity=capacity)
            rows = jax.eval_shape(read, model, prompts)
            prefill = partial(_prefill, read=read)
            yield Program(f"prefill_b{b}_t{t}", sizes, LANGUAGE, prefill, prompts)
            arrays = {"steps": shape((), jnp.int32), **_name_rows(rows)}
            for kind, ids in (("decode", group), ("plain", ())):
                decode = partial(_decode, like=rows, stop=stop, group=ids)
                yield Program(f"{kind}_b{b}_t{t}", sizes, LANGUAGE, decode, arrays)
    one = jax.eval_shape(_encode, model, {name: _rows(array, 1) for name, array in images.items()})
    maps = {name: array for name, array in one.items() if name.startswith("maps.")}
    shapes = (config.codebook.scales, config.codebook.tokens_per_scale, config.language.width)
    for m in buckets.targets:
        targets = {name: _rows(array, m) for name, array in maps.items()}
        targets["states"] = shape((m, *shapes), jnp.dtype(config.dtype))
        yield Program(f"masks_m{m}", {"targets": m}, MASKS, _masks, targets)


def name_weights(model: PixelLM) -> Arrays:
    """Return all arrays of a model by name, e.g. "language_model.layers.0.query.weight"."""
    return {name.removesuffix(".value"): leaf for name, leaf in name_leaves(model).items()}


def name_leaves(tree: Any) -> Arrays:
    """Return the leaves of a tree by their dotted paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _name_rows(rows: decoding.DecodeState) -> Arrays:
    """Return the arrays of a decode state by their names in the exported programs."""
    return {EXPORTED_NAMES.get(name, name): leaf for name, leaf in name_leaves(rows).items()}


def _encode(model: PixelLM, inputs: Arrays) -> Arrays:
    image = decoding.encode(model, inputs["image"], inputs["image_hw"])
    maps = {f"maps.{scale}": features for scale, features in enumerate(image.maps)}
    return {"image_tokens": image.tokens, "image_valid": image.token_valid, **maps}


def _read(
    model: PixelLM, inputs: Arrays, *, prefix: int, room: int, capacity: int
) -> decoding.DecodeState:
    """Rows ready for `generate.decode`, from whole prompts padded on the right."""
    tokens, length = inputs["tokens"], inputs["length"]
    shared = decoding.read_prefix(
        model, inputs["image_tokens"], inputs["image_valid"], tokens[:, :prefix]
    )
    rows = decoding.prefill(
        model.language_model,
        [shared],
        tokens[:, prefix:],
        length - prefix,
        inputs["budget"],
        Sampling(inputs["seed"], inputs["temperature"], inputs["top_p"]),
        token_capacity=room,
    )
    return decoding.resize(rows, jnp.arange(len(length)), capacity=capacity)


def _prefill(
    model: PixelLM, inputs: Arrays, *, read: Callable[[PixelLM, Arrays], decoding.DecodeState]
) -> Arrays:
    return _name_rows(read(model, inputs))


def _decode(
    model: PixelLM, inputs: Arrays, *, like: decoding.DecodeState, stop: int, group: tuple[int, ...]
) -> Arrays:
    """Decode. `steps`: the maximum on input, the actual number on output. Ended rows are kept."""
    leaves, language = [inputs[name] for name in _name_rows(like)], model.language_model
    rows = jax.tree.unflatten(jax.tree.structure(like), leaves)
    rows, passes = decoding.decode(language, rows, inputs["steps"], stop=stop, group=group)
    return {"steps": passes, **_name_rows(rows)}


def _masks(model: PixelLM, inputs: Arrays) -> Arrays:
    maps = tuple(inputs[f"maps.{scale}"] for scale in range(model.config.codebook.scales))
    return {"mask_logits": decoding.decode_masks(model, inputs["states"], [maps])}


def _rows(array: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)


def _write(
    program: Program, model: PixelLM, file: Path, platforms: Sequence[str]
) -> dict[str, Any]:
    """Serialise a program; return its entry in the manifest."""
    names, structure = list(name_weights(model)), jax.tree.structure(model)
    used = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in name_weights(model).items()
        if name.partition(".")[0] in program.parts
    }

    def run(weights: Arrays, inputs: Arrays) -> Arrays:
        leaves = [weights.get(name) for name in names]  # None if the program does not use it
        return program.function(jax.tree.unflatten(structure, leaves), inputs)

    exported = jax.export.export(jax.jit(run), platforms=platforms)(used, program.inputs)
    file.write_bytes(exported.serialize())
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    arguments = [*(f"weights {name}" for name in sorted(used)), *sorted(program.inputs)]
    return {
        "file": f"{PROGRAMS}/{file.name}",
        **program.sizes,
        "weights": sorted(used),
        "inputs": {name: _describe(array) for name, array in sorted(program.inputs.items())},
        "outputs": {name: _describe(array) for name, array in sorted(outputs.items())},
        "arguments": [arguments[index] for index in exported.module_kept_var_idx],
    }


def _manifest(
    model: PixelLM,
    vocabulary: Vocabulary,
    buckets: Buckets,
    prefix: Int32[np.ndarray, "t"],
    made: Path,
) -> dict[str, Any]:
    """Return the manifest: names, shapes and constants.

    A prompt is `prompt.prefix` and then the ids of before + question + after without the first,
    with which the prefix ends. `image.mean` and `image.std` are information only: the program
    `encode` normalises.
    """
    config, template = model.config, TEMPLATES[model.config.template]
    return {
        "format": FORMAT,
        "jax": jax.__version__,
        "weights": {name: _describe(array) for name, array in name_weights(model).items()},
        "image": {
            "canvas": config.vision.canvas,
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
        },
        "buckets": {
            name: list(getattr(buckets, name)) for name in ("batch", "question", "targets")
        },
        "limits": {"positions": config.language.max_positions, "new_tokens": buckets.new_tokens},
        "prompt": {
            "prefix": prefix.tolist(),
            "before": f"{IM_END}\n",
            "after": template.first_question[1] + template.assistant,
        },
        "ids": {
            "image": IMAGE_TOKEN,
            **{name: getattr(vocabulary, name) for name in SPECIAL},
            "codebook": [list(scale) for scale in vocabulary.codebook],
        },
        "tokenizer": {
            "files": sorted(f"{TOKENIZER}/{path.name}" for path in (made / TOKENIZER).iterdir()),
            **describe_tokenizer(vocabulary),
        },
    }


def describe_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what the files of a tokenizer do not state.

    marks: tokens at which a text is split; those in `keeping` keep the white space around them.
    legacy: see `SentencePieceEncoder`.
    """
    ids, encoder = vocabulary.ids, vocabulary.encoder
    return {
        "marks": {token: index for token, index in ids.items() if index in vocabulary.marks},
        "keeping": sorted(vocabulary.keep_blanks),
        "legacy": encoder.legacy if isinstance(encoder, SentencePieceEncoder) else True,
    }


def _prefix(config: ModelConfig, vocabulary: Vocabulary) -> Int32[np.ndarray, "t"]:
    """Return the ids with which every prompt about an image begins, up to `<im_end>`."""
    template = TEMPLATES[config.template]
    ids = question_ids(vocabulary, template, "?", image_tokens=config.image_tokens)
    return ids[: prefix_length(ids)]


def _check(config: ModelConfig, buckets: Buckets, prefix: int) -> None:
    longest = buckets.question[-1]
    limit = config.language.max_positions - prefix - 1
    if longest > limit:
        raise InputError(f"questions of {longest} tokens: the model has room for {limit}; cut them")


def _describe(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}
