"""Compares every quantity of a reference file (MODEL_GOLDENS format) with this implementation.

    python tests/parity/check_reference.py FILE.npz

Writes the folders of a released checkpoint, converts them as `pixellm convert` does, runs the model
in float32 and prints the largest relative error of each quantity (largest difference over largest
value). Exits with 1 above tolerance. Tolerances: 1e-4 for states, logits and losses, 1e-3 for
gradient norms (sums over many float32 products in another order), ids equal, mask IoU > 0.9999.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # also runs where nothing is installed

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from reference import write_folders

from pixellm_jax.batch import Batch
from pixellm_jax.config import ModelConfig
from pixellm_jax.images.geometry import VOID, fitted_size, unfit
from pixellm_jax.model.layers import resize_bilinear
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.model.vision_encoder import patch_valid
from pixellm_jax.text.prompt import IMAGE_TOKEN
from pixellm_jax.training.config import LossConfig
from pixellm_jax.training.losses import Losses, losses
from pixellm_jax.weights import torch_layout
from pixellm_jax.weights.checkpoint import load_model
from pixellm_jax.weights.convert import convert
from tests.support.greedy_decoding import generate

STATE, LOSS, GRADIENT, IOU = 1e-4, 1e-4, 1e-3, 1 - 1e-4


class Line(NamedTuple):
    """One compared quantity: its error and what it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        """Within tolerance (a NaN is not)."""
        return self.error <= self.tolerance


def check(file: Any) -> Iterator[Line]:
    """Compares one open .npz, quantity after quantity; what cannot be compared is a bad line."""
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        convert(*write_folders(file, out), out / "jax")
        model = load_model(out / "jax", dtype="float32")
    settings = json.loads(str(file["config"]))
    batch = read_batch(file, settings, model.config)
    for part in (_vision, _forward, _gradients, _generation):
        try:
            yield from part(file, settings, model, batch)
        except Exception as error:
            yield Line(f"{part.__name__}: {type(error).__name__}: {error}", float("inf"), 0)


def read_batch(file: Any, settings: dict[str, Any], config: ModelConfig) -> Batch:
    """Row by row: every conversation is a sequence of its own, its image repeated."""
    ids, valid, labels = (file[name] for name in ("input_ids", "attention_mask", "labels"))
    owner = np.repeat(np.arange(len(file["offset"]) - 1), np.diff(file["offset"]))
    n, codebook, canvas = config.image_tokens, config.codebook, config.vision.canvas

    def expand(row: np.ndarray, values: np.ndarray, fill: int) -> np.ndarray:
        at = int(np.flatnonzero(row == IMAGE_TOKEN)[0])
        return np.concatenate([values[:at], np.full(n, fill), values[at + 1 :]])

    tokens = np.stack([expand(row, row, IMAGE_TOKEN) for row in ids])
    live = np.stack([expand(row, v, 1) for row, v in zip(ids, valid, strict=True)])
    supervised = np.stack([expand(row, v, -100) for row, v in zip(ids, labels, strict=True)]) >= 0

    seg = np.asarray(settings["seg_ids"])
    places = [np.flatnonzero(row == seg[0]) for row in tokens]
    slots = max(len(p) for p in places)
    shape = (len(ids), slots, codebook.scales, codebook.tokens_per_scale)
    index, filled = np.zeros(shape, np.int32), np.zeros(shape[:2], bool)
    masks = np.full((*shape[:2], canvas, canvas), VOID, np.uint8)
    for row, starts in enumerate(places):
        first = sum(len(places[r]) for r in range(row) if owner[r] == owner[row])
        truth = _truth(file, owner[row])
        for slot, start in enumerate(starts):
            assert (tokens[row, start : start + len(seg)] == seg).all()
            index[row, slot] = (start - 1 + np.arange(len(seg))).reshape(shape[2:])
            filled[row, slot] = True
            h, w = truth.shape[1:]
            masks[row, slot, :h, :w] = truth[first + slot]

    hw = np.asarray(settings["resized_hw"], np.int32)
    images = _images(settings, canvas)
    return Batch(
        image=np.ascontiguousarray(images.transpose(0, 2, 3, 1))[owner],
        image_hw=hw[owner],
        tokens=np.where(live, tokens, 0).astype(np.int32),
        segment=np.where(live, 0, -1).astype(np.int32),
        position=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        loss_mask=supervised,
        codebook_index=index,
        masks=masks,
        target_valid=filled,
        target_conversation=np.zeros(shape[:2], np.int32),
    )


def _images(settings: dict[str, Any], canvas: int) -> np.ndarray:
    sizes = settings["resized_hw"]
    images = np.random.default_rng([settings["seed"], 12345]).standard_normal(
        (len(sizes), 3, canvas, canvas), dtype=np.float32
    )
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, h:], image[:, :, w:] = 0, 0
    return images


def _bits(file: Any, name: str) -> np.ndarray:
    shape = tuple(file[f"{name}_shape"])
    return np.unpackbits(file[name], count=int(np.prod(shape))).reshape(shape).astype(bool)


def _truth(file: Any, image: int) -> np.ndarray:
    return _bits(file, f"gt_{image}")


def _error(found: Any, wanted: np.ndarray) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, f"shapes {found.shape} and {wanted.shape}"
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-30))


def _vision(file: Any, settings: dict[str, Any], model: PixelLM, batch: Batch) -> Iterator[Line]:
    valid = patch_valid(jnp.asarray(batch.image_hw), model.config.vision)
    taps = jax.jit(lambda m, image: m.vision_encoder(image, valid))(model, batch.image)
    mask = np.concatenate([np.ones((len(valid), 1), bool), valid.reshape(len(valid), -1)], axis=1)
    yield Line("vision_mask", float((mask != file["vision_mask"]).sum()), 0)
    for name, tap in zip(("vision_selected", "vision_early"), taps, strict=False):
        yield Line(name, _error(np.asarray(tap)[:, ::37, ::5], file[name]), STATE)


def _forward(file: Any, settings: dict[str, Any], model: PixelLM, batch: Batch) -> Iterator[Line]:
    run = jax.jit(lambda m, b: m(b))
    rows = [run(model, row) for row in _rows(batch)]
    prediction = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    live = (batch.segment >= 0)[:, ::7]
    hidden = np.asarray(prediction.hidden)[:, ::7]
    yield Line("llm_hidden", _error(hidden[live], file["llm_hidden"][live]), STATE)

    low = np.asarray(prediction.mask_logits)
    worst: dict[str, float] = {"low_res": 0.0, "mask_logits": 0.0, "mask_iou": 1.0}
    for image, (hw, original) in enumerate(
        zip(settings["resized_hw"], settings["original_hw"], strict=True)
    ):
        rows = slice(*file["offset"][image : image + 2])
        logits = low[rows][batch.target_valid[rows]]
        worst["low_res"] = max(worst["low_res"], _error(logits, file[f"low_res_{image}"]))
        final = _finish(logits, tuple(hw), tuple(original), model.config.vision.canvas)
        grid = _error(final[:, ::16, ::16], file[f"mask_{image}_logit_grid"])
        worst["mask_logits"] = max(worst["mask_logits"], grid)
        truth = _bits(file, f"mask_{image}")
        for logit, true in zip(final, truth, strict=True):
            # Where the logit is zero within its own tolerance, either side is right.
            sure = np.abs(logit) > STATE * np.abs(logit).max()
            mask = logit > 0
            union = ((mask | true) & sure).sum()
            iou = (mask & true & sure).sum() / union if union else 1.0
            worst["mask_iou"] = min(worst["mask_iou"], float(iou))
    yield Line("low_res logits", worst["low_res"], STATE)
    yield Line("final mask logits", worst["mask_logits"], STATE)
    yield Line("1 - mask IoU", 1 - worst["mask_iou"], 1 - IOU)


def _finish(
    logits: np.ndarray, fitted: tuple[int, int], hw: tuple[int, int], canvas: int
) -> np.ndarray:
    """Logits at the original size; by hand where the file's sizes are not those of `fit`."""
    if fitted_size(hw, canvas) == fitted:
        return unfit(logits, hw, canvas)
    square = resize_bilinear(jnp.asarray(logits)[..., None], canvas, canvas)
    return np.asarray(resize_bilinear(square[:, : fitted[0], : fitted[1]], *hw)[..., 0])


def _rows(batch: Batch) -> Iterator[Batch]:
    """The rows one by one, so that memory does not grow with the file."""
    for row in range(len(batch.tokens)):
        yield Batch(*(array[row : row + 1] for array in batch))


def _gradients(file: Any, settings: dict[str, Any], model: PixelLM, batch: Batch) -> Iterator[Line]:
    graph, trained, rest = nnx.split(
        model,
        lambda path, value: isinstance(value, nnx.Param) and "vision_encoder" not in path,
        ...,
    )

    @jax.jit
    def run(trained: nnx.State, row: Batch, text: float, masks: float) -> Any:
        """Gradient and terms of a row's share; `text`, `masks`: its part of all that counts."""

        def total(trained: nnx.State) -> tuple[jax.Array, Any]:
            terms = losses(nnx.merge(graph, trained, rest)(row), row, LossConfig(alpha=1.0))
            bce, dice = masks * terms.mask_bce, masks * terms.mask_dice
            share = Losses(text * terms.text + bce + dice, text * terms.text, bce, dice)
            return share.total, share

        return jax.grad(total, has_aux=True)(trained)

    tokens, targets = batch.loss_mask[:, 1:].sum(1), batch.target_valid.sum(1)
    shares = [counts / max(counts.sum(), 1) for counts in (tokens, targets)]
    parts = [run(trained, row, *share) for row, *share in zip(_rows(batch), *shares, strict=True)]
    gradient, terms = jax.tree.map(lambda *each: sum(each), *parts)
    names = ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss")
    for name, term in zip(names, terms, strict=True):
        yield Line(name, _error(term, file[name]), LOSS)

    flat = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(gradient)}
    norms = {}
    for entry in torch_layout.table(model.config, kind="required"):
        if entry.path in flat:
            layers = np.asarray(flat[entry.path], np.float64)
            for name, layer in zip(entry.names, layers if entry.count else [layers], strict=True):
                norms[name] = float(np.linalg.norm(layer))
    unused = {entry.name for entry in torch_layout.table(model.config, kind="unused")}
    wanted = dict(zip(map(str, file["grad_names"]), file["grad_norms"], strict=True))
    worst, where = 0.0, ""
    largest = max(wanted.values())
    for name, norm in wanted.items():
        if name in unused:
            error = 0.0 if norm <= 0 else float("inf")
        elif name.endswith("k_proj.bias"):
            # The same vector added to every key changes no softmax: zero but for rounding.
            error = 0.0 if max(norm, norms.get(name, np.inf)) < 1e-6 * largest else float("inf")
        else:
            error = abs(norms.get(name, np.nan) - max(norm, 0)) / max(norm, 1e-30)
        if not error <= worst:
            worst, where = error, name
    yield Line(f"gradient norms ({len(wanted)}; worst {where})", worst, GRADIENT)


def _generation(
    file: Any, settings: dict[str, Any], model: PixelLM, batch: Batch
) -> Iterator[Line]:
    encode = jax.jit(lambda m, image, hw: m.encode_image(image, hw))
    wrong = 0
    images = _images(settings, model.config.vision.canvas).transpose(0, 2, 3, 1)
    for image, hw in enumerate(settings["resized_hw"]):
        if f"gen_{image}" not in file.files or not file[f"gen_{image}"].size:
            continue  # the reference was asked nothing about it
        wanted, length = file[f"gen_{image}"], int(file[f"gen_prompt_len_{image}"])
        at = int(np.flatnonzero(wanted == IMAGE_TOKEN)[0])
        prompt = wanted[:length]
        n = model.config.image_tokens
        tokens = np.concatenate([prompt[:at], np.full(n, IMAGE_TOKEN), prompt[at + 1 :]])
        padded = np.zeros((1, len(tokens) + 5), np.int32)
        padded[0, : len(tokens)] = tokens
        features = encode(model, images[image : image + 1], np.asarray([hw], np.int32))
        budget, stop = 48, settings["llm"].get("eos_token_id", 2)
        lengths = np.asarray([len(tokens)], np.int32)
        out = generate(model, features, padded, lengths, budget=budget, stop=stop)
        new = np.asarray(out.tokens)[0, : int(out.num_generated[0])]
        wrong += not np.array_equal(new, wanted[length:])
    yield Line("answers with other ids", float(wrong), 0)


def main() -> int:
    """Prints the table; 0 if everything is within tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help=".npz in the format of MODEL_GOLDENS")
    file = np.load(parser.parse_args().file)
    bad = 0
    for line in check(file):
        bad += not line.good
        verdict = "ok" if line.good else "TOO LARGE"
        print(f"{line.name:60s} {line.error:9.2e}  <= {line.tolerance:.0e}  {verdict}", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
