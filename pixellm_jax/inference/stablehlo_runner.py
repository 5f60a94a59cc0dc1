"""Stand-alone runner of the programs written by `pixellm export --stablehlo`: no model code.

    python run.py photo.jpg "Where is the dog?" --out answer

It needs jax, numpy, safetensors, tokenizers and Pillow, and flatbuffers, with which `jax.export`
reads programs. sentencepiece is needed only if the tokenizer is a `tokenizer.model`. The tokenizer
rule and the canvas geometry are repeated here on purpose: the file must stand alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export  # not part of `import jax`
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image, ImageOps
from safetensors.numpy import load_file

try:
    import sentencepiece
except ImportError:
    sentencepiece = None  # type: ignore[assignment]

RUNNING, REASONS = 1, {2: "stop", 3: "length", 4: "damaged"}  # status of a row; 0 is unused
MARKER = "[SEG]"  # represents a target in the text of an answer

_NO_GAP_AFTER = tuple(" \t\n([{«“‘（「『")
_NO_GAP_BEFORE = re.compile(r"[\s.,;:!?)\]}»”’。，、；：！？）」』]|'s\b")

Arrays = dict[str, Any]
ImageSource = str | Path | np.ndarray  # a file, or uint8 RGB [y x 3]


class RunnerError(Exception):
    """An error that the user can correct; the message is one line."""


class Answer(NamedTuple):
    """Text with `[SEG]` at every target, and masks at the size of the upright image.

    Attributes:
        text: the answer.
        ids: generated token ids.
        masks: bool [m y x].
        scores: mean probability inside each mask.
        presence: probability of the first codebook token of each target.
        reason: why the answer ended: "stop", "length" or "damaged" (not finite).
        passes: number of decoding steps.
    """

    text: str
    ids: list[int]
    masks: np.ndarray
    scores: np.ndarray
    presence: np.ndarray
    reason: str
    passes: int


class Runner:
    """Programs and weights of a folder; a program is compiled when it is first used.

    Example:
        runner = Runner("out")
        answer = runner("photo.jpg", "Where is the dog?")
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        self.tokenizer = Tokenizer(self.folder / "tokenizer", self.manifest)
        self.codebook = np.asarray(self.manifest["ids"]["codebook"])
        files = sorted(self.folder.glob("weights/*.safetensors"))
        read = (item for file in files for item in load_file(file).items())
        self._weights = {name: jnp.asarray(array) for name, array in read}
        self._compiled: dict[str, Any] = {}

    def __call__(self, image: ImageSource, question: str, **options: Any) -> Answer:
        """Answer a question about an image. `options`: as for `batch`."""
        return self.batch([(image, question)], **options)[0]

    def batch(
        self,
        pairs: Sequence[tuple[ImageSource, str]],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        fast_forward: bool = True,
    ) -> list[Answer]:
        """Answer pairs of image and question, in batches of up to the largest bucket.

        Args:
            pairs: images and questions.
            temperature: 0 is greedy decoding.
            top_p: nucleus sampling.
            seed: of the sampling.
            fast_forward: jump-forward decoding: the tokens of a target cost one step.
        """
        requests = [(read_image(image), self._encode(question)) for image, question in pairs]
        sampling: Arrays = {"temperature": np.float32(temperature), "top_p": np.float32(top_p)}
        sampling["seed"] = np.uint32(int(seed) % 2**32)
        size = self.manifest["buckets"]["batch"][-1]
        kind = "decode" if fast_forward else "plain"
        batches = (requests[start : start + size] for start in range(0, len(requests), size))
        return [answer for batch in batches for answer in self._answer(batch, sampling, kind)]

    def call(self, name: str, inputs: Arrays) -> Arrays:
        """Run a program; the inputs of `decode` and `plain` are donated."""
        program = self.manifest["programs"][name]
        if name not in self._compiled:
            file = self.folder / program["file"]
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
            rows = name.startswith(("decode", "plain"))
            self._compiled[name] = jax.jit(exported.call, donate_argnums=(1,) if rows else ())
        weights = {weight: self._weights[weight] for weight in program["weights"]}
        return self._compiled[name](weights, {key: inputs[key] for key in program["inputs"]})

    def _encode(self, question: str) -> list[int]:
        """Return the ids of a prompt after its prefix."""
        prompt = self.manifest["prompt"]
        limit = self.manifest["buckets"]["question"][-1]
        ids = self.tokenizer.encode(prompt["before"] + question + prompt["after"])[1:]
        if not question.strip() or len(ids) > limit:
            raise RunnerError(f"a question of {len(ids)} tokens: ask one of words, up to {limit}")
        return ids

    def _answer(
        self, requests: list[tuple[np.ndarray, list[int]]], sampling: Arrays, kind: str
    ) -> Iterator[Answer]:
        """Answer one batch, padded with copies of the last request."""
        buckets, limits = self.manifest["buckets"], self.manifest["limits"]
        b = min(size for size in buckets["batch"] if size >= len(requests))
        t = next(size for size in buckets["question"] if size >= max(len(q) for _, q in requests))
        canvas, prefix = self.manifest["image"]["canvas"], self.manifest["prompt"]["prefix"]
        tokens = np.full((b, len(prefix) + t), self.manifest["ids"]["pad"], np.int32)
        length = np.zeros(b, np.int32)
        padded = requests + requests[-1:] * (b - len(requests))
        for i, (_, ids) in enumerate(padded):
            length[i] = len(prefix) + len(ids)
            tokens[i, : length[i]] = [*prefix, *ids]
        budget = np.minimum(limits["new_tokens"], limits["positions"] - length).astype(np.int32)
        budget[len(requests) :] = 0
        image, hw = map(np.asarray, zip(*(fit(i, canvas) for i, _ in padded), strict=True))
        encoded = self.call(f"encode_b{b}", {"image": image, "image_hw": hw.astype(np.int32)})
        prompts = {"tokens": tokens, "length": length, "budget": budget}
        prompts |= {name: np.full(b, value) for name, value in sampling.items()}
        rows = self.call(f"prefill_b{b}_t{t}", {**encoded, **prompts})
        while (np.asarray(rows["status"]) == RUNNING).any():
            rows = self.call(f"{kind}_b{b}_t{t}", {**rows, "steps": limits["new_tokens"] + 1})
        for i, (pixels, _) in enumerate(requests):
            yield self._finish(rows, encoded, i, pixels.shape[:2])

    def _finish(self, rows: Arrays, encoded: Arrays, i: int, hw: tuple[int, int]) -> Answer:
        num_generated = int(rows["said"][i])
        num_states = int(rows["fed"][i]) + 1  # generated tokens whose state is known
        ids = np.asarray(rows["tokens"][i])[:num_generated]
        token_prob = np.asarray(rows["chance"][i])
        groups = self._groups(ids)
        complete = groups[groups[:, -1, -1] < num_states]
        logits = self._masks(rows, encoded, i, complete)
        canvas = self.manifest["image"]["canvas"]
        finite = np.isfinite(logits)
        clean = np.where(finite.all(axis=(1, 2), keepdims=True), logits, -1)
        full = [unfit(mask, hw, canvas) for mask in clean]
        end = num_generated if len(complete) == len(groups) else groups[len(complete), 0, 0]
        return Answer(
            text=self._read(ids[:end]),
            ids=ids.tolist(),
            masks=np.asarray([mask > 0 for mask in full], bool).reshape(-1, *hw),
            scores=np.asarray([_score(mask[mask > 0]) for mask in full], np.float32),
            presence=token_prob[complete[:, 0, 0]],
            reason=REASONS[int(rows["status"][i])] if finite.all() else "damaged",
            passes=int(rows["passes"][i]),
        )

    def _masks(self, rows: Arrays, encoded: Arrays, i: int, groups: np.ndarray) -> np.ndarray:
        """Return the mask logits of the targets of a row."""
        buckets = self.manifest["buckets"]["targets"]
        parts: list[np.ndarray] = []
        maps = [name for name in encoded if name.startswith("maps.")]
        for start in range(0, len(groups), buckets[-1]):
            index = groups[start : start + buckets[-1]]
            m = min(size for size in buckets if size >= len(index))
            padded = np.concatenate([index, np.repeat(index[-1:], m - len(index), axis=0)])
            repeated = {name: jnp.repeat(encoded[name][i : i + 1], m, axis=0) for name in maps}
            logits = self.call(f"masks_m{m}", {"states": rows["states"][i, padded], **repeated})
            parts.append(np.asarray(logits["mask_logits"])[: len(index)])
        return np.concatenate(parts) if parts else np.zeros((0, 1, 1), np.float32)

    def _groups(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices of complete, ordered codebook groups: one group per target."""
        group, values = self.codebook.ravel().tolist(), ids.tolist()
        starts = [i for i in range(len(values)) if values[i : i + len(group)] == group]
        indices = np.reshape(starts, (-1, 1)).astype(int) + np.arange(len(group))
        return indices.reshape(-1, *self.codebook.shape)

    def _read(self, ids: np.ndarray) -> str:
        """Return the text of an answer: targets as `MARKER`, without other special tokens."""
        ids = ids[: [*np.flatnonzero(ids == self.manifest["ids"]["eos"]), len(ids)][0]]
        target = np.zeros(len(ids), int)
        for number, group in enumerate(self._groups(ids)):
            target[group] = number + 1
        kinds = [(n, int(i) not in self.tokenizer.words) for n, i in zip(target, ids, strict=True)]
        text = ""
        for (number, mark), run in itertools.groupby(enumerate(kinds), key=lambda kind: kind[1]):
            if mark and not number:
                continue
            words = MARKER if number else self.tokenizer.decode([int(ids[i]) for i, _ in run])
            words = words.lstrip(" " if text else None)
            if text and not (text.endswith(_NO_GAP_AFTER) or _NO_GAP_BEFORE.match(words)):
                text += " "
            text += words
        return text.rstrip()


class Tokenizer:
    """Tokenizer of the released models (rule: see `encode`). `words`: ids that are text."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        settings = manifest["tokenizer"]
        self.marks, self.keeping = settings["marks"], set(settings["keeping"])
        longest = sorted(self.marks, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest)))
        self.legacy = settings["legacy"]
        self.pieces: Any = None
        if (file := folder / "tokenizer.model").is_file():
            if sentencepiece is None:
                raise RunnerError(f"{file}: needs `pip install sentencepiece`")
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            known = set(range(self.pieces.get_piece_size()))
        else:
            self.whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.whole.no_truncation()
            self.whole.no_padding()
            known = set(self.whole.get_vocab(with_added_tokens=False).values())
        self.words = known - set(self.marks.values())

    def encode(self, text: str) -> list[int]:
        """Encode without a start token. Marks split the text; most strip the blanks around them."""
        ids: list[int] = []
        begin = 0
        strip = False
        for match in itertools.chain(self._splitter.finditer(text), [None]):
            end = match.start() if match else len(text)
            if strip:
                begin = end - len(text[begin:end].lstrip())
            strip = match is not None and match[0] not in self.keeping
            if strip:
                end = begin + len(text[begin:end].rstrip())
            if begin < end:
                ids += self._stretch(text[begin:end], first=begin == 0)
            if match:
                ids.append(self.marks[match[0]])
                begin = match.end()
        return ids

    def decode(self, ids: list[int]) -> str:
        """Decode ids that are all `words`."""
        if self.pieces is not None:
            return self.pieces.decode(ids)
        return self.whole.decode(ids, skip_special_tokens=False)

    def _stretch(self, text: str, *, first: bool) -> list[int]:
        if self.pieces is None:
            return self.whole.encode(text, add_special_tokens=False).ids
        if self.legacy:
            return self.pieces.encode(text)
        text = text.replace("▁", " ")
        ids = self.pieces.encode(text)
        head = self.pieces.id_to_piece(ids[0]) if ids else ""
        if first or text.startswith(" ") or not head.startswith("▁"):
            return ids
        return ([self.pieces.piece_to_id(head[1:])] if head != "▁" else []) + ids[1:]


def read_image(source: ImageSource) -> np.ndarray:
    """Read upright RGB of 0..255: transparency on white, 16-bit grey scaled to 8 bits."""
    if isinstance(source, np.ndarray):
        return source
    try:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                grey = np.rint(np.asarray(image) * np.float32(255 / 65535)).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if image.has_transparency_data:
                background = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(background, image.convert("RGBA"))
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunnerError(f"{str(source)!r} cannot be read as an image ({reason})") from None


def fit(image: np.ndarray, canvas: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an image onto the canvas; return the canvas and the fitted (height, width)."""
    height, width = _fitted(image.shape[:2], canvas)
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((canvas, canvas, 3), np.uint8)
    out[:height, :width] = np.asarray(scaled)
    return out, (height, width)


def unfit(logits: np.ndarray, hw: tuple[int, int], canvas: int) -> np.ndarray:
    """Resize mask logits to the original image: to the canvas, crop, to the original size."""
    axes = zip(logits.shape, _fitted(hw, canvas), hw, strict=True)
    down, right = (
        (_bilinear(fitted, original) @ _bilinear(side, canvas)[:fitted]).astype(np.float32)
        for side, fitted, original in axes
    )
    return down @ logits.astype(np.float32) @ np.ascontiguousarray(right.T)


def _fitted(hw: Sequence[int], canvas: int) -> tuple[int, int]:
    height, width = (int(side * (canvas / max(hw)) + 0.5) for side in hw)
    if min(height, width) < 1:
        raise RunnerError(f"an image of {hw[0]} x {hw[1]} pixels is too elongated: crop it")
    return height, width


def _bilinear(source: int, target: int) -> np.ndarray:
    """Return the matrix of 1-D linear interpolation: half-pixel centres, clamped at the ends."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).clip(0, source - 1)
    low = position.astype(int)
    matrix, row = np.zeros((target, source)), np.arange(target)
    matrix[row, low] = 1 - (position - low)
    matrix[row, np.minimum(low + 1, source - 1)] += position - low
    return matrix


def _score(inside: np.ndarray) -> float:
    return float((1 / (1 + np.exp(-inside))).mean(dtype=np.float64)) if inside.size else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question; return the exit code (0, or 2 for bad input)."""
    parser = argparse.ArgumentParser(description="Ask about an image: text and a mask per target.")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--out", type=Path, help="for answer.json and mask_00.png, ...")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        answer = Runner(Path(__file__).parent)(options.image, options.question)
        print(answer.text)
        if options.out is not None:
            _write(options.out, answer)
    except (RunnerError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _write(out: Path, answer: Answer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("mask_[0-9]*.png") if (out / "answer.json").exists() else ():
        old.unlink()  # masks of an earlier answer
    record = answer._asdict()
    for number, mask in enumerate(record.pop("masks")):
        Image.fromarray(mask.astype(np.uint8) * 255).save(out / f"mask_{number:02}.png")
    text = json.dumps(record, indent=2, default=np.ndarray.tolist) + "\n"
    (out / "answer.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
