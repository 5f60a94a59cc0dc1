"""Array axes: one letter per axis in annotations and einsums, and a logical name in parameters.

Parameters carry logical names in their `axes` string, and `sharding.py` maps logical names to mesh
axes. A name that is not in the legend is an error.
"""

from __future__ import annotations

from typing import NamedTuple


class Axis(NamedTuple):
    """Meaning of a letter, and the logical name that parameters carry for it."""

    meaning: str
    logical: str


AXES: dict[str, Axis] = {
    "b": Axis("images of the batch", "batch"),
    "t": Axis("sequence positions (of the queries, in attention)", "sequence"),
    "u": Axis("sequence positions of the keys", "keys"),
    "p": Axis("patches of the image, row-major", "patch"),
    "i": Axis("image positions in the language model's sequence", "image_token"),
    "d": Axis("width of the language model", "embed"),
    "e": Axis("width of the vision encoder", "vision"),
    "c": Axis("width of the pixel decoder", "decoder"),
    "f": Axis("hidden width of an MLP", "mlp"),
    "n": Axis("attention heads", "heads"),
    "g": Axis("key/value heads", "kv_heads"),
    "a": Axis("attention heads that share one key/value head", "shared_heads"),
    "h": Axis("size of one attention head", "head"),
    "v": Axis("vocabulary", "vocab"),
    "l": Axis("stacked layers", "layer"),
    "s": Axis("feature scales of the codebook", "scale"),
    "k": Axis("codebook tokens per scale", "codebook"),
    "m": Axis("target slots", "target"),
    "j": Axis("ground-truth targets, in arrays where m is the predicted ones", "truth"),
    "r": Axis("rank of a LoRA pair", "rank"),
    "y": Axis("rows of an image or feature grid", "rows"),
    "x": Axis("columns of an image or feature grid", "columns"),
    "Y": Axis("rows of a mask grid", "mask_rows"),
    "X": Axis("columns of a mask grid", "mask_columns"),
    "w": Axis("rows inside a patch or kernel", "kernel_rows"),
    "z": Axis("columns inside a patch or kernel", "kernel_columns"),
    "o": Axis("outputs of a convolution or head", "out"),
    "q": Axis("learned query tokens of the pixel decoder", "query"),
}

LOGICAL: frozenset[str] = frozenset(axis.logical for axis in AXES.values()) | {
    "colour",  # red, green, blue
    "position",  # rows of a position table
    "frequency",  # Fourier features
    "coordinate",  # x, y
}
"""Logical names, including the axes that have no letter."""


def logical_axes(axes: str) -> tuple[str, ...]:
    """Split a parameter's `axes` string, e.g. "embed mlp", and reject unknown names.

    Raises:
        ValueError: a name is not in the legend.
    """
    names = tuple(axes.split())
    unknown = [name for name in names if name not in LOGICAL]
    if unknown:
        raise ValueError(f"axis names {unknown} are not in the legend of pixellm_jax.axes")
    return names
