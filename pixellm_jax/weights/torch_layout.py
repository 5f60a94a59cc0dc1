"""Declarative table of the released PyTorch layout, read in both directions: import and export.

Each row maps a tensor of a published checkpoint, or the same tensor of every layer, to one of our
parameters. Names and shapes are as published (docs/reference_notes.md 6.3), which are not the
attribute names of current transformers releases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pixellm_jax.config import ModelConfig

MODEL, VISION = "model", "vision"
"""The two source folders: PixelLM (or LLaVA), and CLIP."""

IGNORED = {
    MODEL: ("model.vision_tower.", "model.mm_projector.weight", "model.mm_projector.bias"),
    VISION: ("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
}
"""Prefixes of tensors that a folder may hold and that PixelLM does not need: the vision tower is
read from its own folder, LLaVA's linear projector does not fit PixelLM, CLIP has a text encoder."""

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Suffixes of buffers that follow from the config; they are kept so that the export is complete."""

Kind = Literal["required", "optional", "unused"]
"""Role of a row.

required: a parameter that every PixelLM folder holds.
optional: a parameter that is a constant in the released model; a folder holds it once trained.
unused: a tensor that the layout holds and no forward pass of PixelLM reads. It is stored next to
    the parameters, so that an export is complete and bit-exact.
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table: our parameter and the tensor, or stack of tensors, it is read from.

    A tensor of shape `torch` is reshaped to `factored`, then transposed by `order`.
    """

    name: str
    """Name in the file; with `count` > 0 it contains a `{}` for the layer 0..count-1."""
    path: str = ""
    """Dotted name of our parameter; empty for an unused tensor."""
    torch: tuple[int, ...]
    """Shape in the file."""
    factored: tuple[int, ...] = ()
    """Shape after splitting axes, e.g. heads; empty for the shape in the file."""
    order: tuple[int, ...] = ()
    """Transposition of the factored axes; empty for none."""
    count: int = 0
    """Number of layers stacked along a new first axis; 0 for a single tensor."""
    source: str = MODEL
    """Folder of the tensor: `MODEL` or `VISION`."""
    kind: Kind = "required"

    @property
    def names(self) -> list[str]:
        """Names in the file, in stacking order."""
        return [self.name.format(i) for i in range(self.count)] if self.count else [self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        factored = self.factored or self.torch
        ours = tuple(factored[axis] for axis in self.order) if self.order else factored
        return (self.count, *ours) if self.count else ours

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Convert a tensor of the file to our layout (one layer of a stack)."""
        array = array.reshape(self.factored or self.torch)
        return array.transpose(self.order) if self.order else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Convert our array (one layer of a stack) to the layout of the file."""
        array = array.transpose(np.argsort(self.order)) if self.order else array
        return np.ascontiguousarray(array.reshape(self.torch))


def table(
    config: ModelConfig, *, kind: Kind | None = None, source: str | None = None
) -> list[Entry]:
    """Return the rows for a model; `kind` and `source` select some of them."""
    rows = (
        *_language(config),
        *_vision(config),
        *_heads(config),
        *_decoder(config),
        *_fusion(config),
        *_unused_model(config),
        *_unused_vision(config),
    )
    return [row for row in rows if kind in (None, row.kind) and source in (None, row.source)]


def released_fusion(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the fusion constants of the released model by our paths: 1/(N L) and 1/L, float32."""
    s, k = config.codebook.scales, config.codebook.tokens_per_scale
    return {
        "codebook.token_fusion": np.full((s, k), 1 / (s * k), np.float32),
        "codebook.mask_fusion": np.full((s,), 1 / s, np.float32),
    }


def _language(config: ModelConfig) -> Iterator[Entry]:
    c = config.language
    d, n, g, h, f = c.width, c.heads, c.kv_heads, c.head, c.mlp

    def layer(path: str, name: str, torch: tuple, factored: tuple = (), order: tuple = ()) -> Entry:
        return Entry(
            path=f"language_model.layers.{path}.weight",
            name=f"model.layers.{{}}.{name}.weight",
            torch=torch,
            factored=factored,
            order=order,
            count=c.layers,
        )

    yield Entry(
        path="language_model.embedding", name="model.embed_tokens.weight", torch=(c.vocabulary, d)
    )
    yield layer("attention_norm", "input_layernorm", (d,))
    yield layer("query", "self_attn.q_proj", (n * h, d), (n, h, d), (2, 0, 1))
    yield layer("key", "self_attn.k_proj", (g * h, d), (g, h, d), (2, 0, 1))
    yield layer("value", "self_attn.v_proj", (g * h, d), (g, h, d), (2, 0, 1))
    yield layer("out", "self_attn.o_proj", (d, n * h), (d, n, h), (1, 2, 0))
    yield layer("mlp_norm", "post_attention_layernorm", (d,))
    yield layer("gate", "mlp.gate_proj", (f, d), (), (1, 0))
    yield layer("up", "mlp.up_proj", (f, d), (), (1, 0))
    yield layer("down", "mlp.down_proj", (d, f), (), (1, 0))
    yield Entry(path="language_model.norm.weight", name="model.norm.weight", torch=(d,))
    yield Entry(path="language_model.head", name="lm_head.weight", torch=(c.vocabulary, d))


def _vision(config: ModelConfig) -> Iterator[Entry]:
    c = config.vision
    e, n, f, p = c.width, c.heads, c.mlp, c.patch
    h = e // n
    root = "vision_model"

    def one(path: str, name: str, torch: tuple, order: tuple = ()) -> Entry:
        name, path = f"{root}.{name}", f"vision_encoder.{path}"
        return Entry(path=path, name=name, torch=torch, order=order, source=VISION)

    def layer(path: str, name: str, torch: tuple, factored: tuple = (), order: tuple = ()) -> Entry:
        return Entry(
            path=f"vision_encoder.layers.{path}",
            name=f"{root}.encoder.layers.{{}}.{name}",
            torch=torch,
            factored=factored,
            order=order,
            count=c.layers_used,
            source=VISION,
        )

    yield one("class_token", "embeddings.class_embedding", (e,))
    yield one("patch", "embeddings.patch_embedding.weight", (e, 3, p, p), (2, 3, 1, 0))
    yield one("position", "embeddings.position_embedding.weight", (c.table**2 + 1, e))
    for part in ("weight", "bias"):
        yield one(f"embedding_norm.{part}", f"pre_layrnorm.{part}", (e,))
        yield layer(f"attention_norm.{part}", f"layer_norm1.{part}", (e,))
        yield layer(f"mlp_norm.{part}", f"layer_norm2.{part}", (e,))
    for path, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield layer(f"{path}.weight", f"self_attn.{name}.weight", (e, e), (n, h, e), (2, 0, 1))
        yield layer(f"{path}.bias", f"self_attn.{name}.bias", (e,), (n, h))
    yield layer("out.weight", "self_attn.out_proj.weight", (e, e), (e, n, h), (1, 2, 0))
    yield layer("out.bias", "self_attn.out_proj.bias", (e,))
    yield layer("up.weight", "mlp.fc1.weight", (f, e), (), (1, 0))
    yield layer("up.bias", "mlp.fc1.bias", (f,))
    yield layer("down.weight", "mlp.fc2.weight", (e, f), (), (1, 0))
    yield layer("down.bias", "mlp.fc2.bias", (e,))


def _linear(path: str, name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(path=f"{path}.weight", name=f"{name}.weight", torch=(outputs, inputs), order=(1, 0))
    yield Entry(path=f"{path}.bias", name=f"{name}.bias", torch=(outputs,))


def _norm(path: str, name: str, width: int) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        yield Entry(path=f"{path}.{part}", name=f"{name}.{part}", torch=(width,))


def _heads(config: ModelConfig) -> Iterator[Entry]:
    d, e, c = config.language.width, config.vision.width, config.decoder.width
    for path, name in (
        ("image_projector", "mm_projector"),
        ("mask_projector", "out_mm_projector"),
    ):
        yield from _linear(f"{path}.layers.0", f"model.{name}.0", e, 2 * d)
        yield from _linear(f"{path}.layers.1", f"model.{name}.2", 2 * d, d)
    path, name = "codebook.projection.layers", "model.text_hidden_fcs.0"
    yield from _linear(f"{path}.0", f"{name}.0", d, d)
    yield from _linear(f"{path}.1", f"{name}.2", d, c)


def _decoder(config: ModelConfig) -> Iterator[Entry]:
    decoder, scales = config.decoder, config.codebook.scales
    d, c, o = config.language.width, decoder.width, decoder.upscaled
    ours, neck, head = "pixel_decoder", "model.image_feature_neck", "model.mask_decoder"

    def weight(
        path: str, name: str, torch: tuple, factored: tuple = (), order: tuple = ()
    ) -> Entry:
        path = f"{ours}.{path}"
        return Entry(path=path, name=name, torch=torch, factored=factored, order=order)

    yield weight("neck.reduce.weight", f"{neck}.0.weight", (c, d, 1, 1), (c, d), (1, 0))
    yield from _norm(f"{ours}.neck.reduce_norm", f"{neck}.1", c)
    yield weight("neck.mix", f"{neck}.2.weight", (c, c, 3, 3), (), (2, 3, 1, 0))
    yield from _norm(f"{ours}.neck.mix_norm", f"{neck}.3", c)
    yield weight("dense", "model.prompt_encoder.no_mask_embed.weight", (1, c), (c,))
    yield weight("score_token", f"{head}.iou_token.weight", (1, c), (c,))
    yield weight("mask_tokens", f"{head}.mask_tokens.weight", (decoder.mask_tokens, c))
    yield weight("level", f"{head}.level_embed.weight", (scales, c))
    for scale in range(scales):
        owner = f"{head}.pe{scale}" if scale else "model.prompt_encoder.pe_layer"
        name = f"{owner}.positional_encoding_gaussian_matrix"
        yield weight(f"positions.{scale}.matrix", name, (2, c // 2))
        yield from _transformer(config, scale)
    for scale in range(1, scales):
        name = f"{head}.{upsample_name(scale)}"
        yield from _upsample(f"{ours}.upsamples.{scale - 1}", name, c, c)
    yield from _upsample(f"{ours}.output", f"{head}.output_upscaling", c, o)
    for i, (inputs, outputs) in enumerate(((c, c), (c, c), (c, o))):
        name = f"{head}.output_hypernetworks_mlps.0.layers.{i}"
        yield from _linear(f"{ours}.hypernetwork.layers.{i}", name, inputs, outputs)


def upsample_name(scale: int) -> str:
    """Return the module name of an upsampling.

    Scale 1 has the released name; further scales, which the release does not have, are numbered.
    """
    return "upsample_2x" if scale == 1 else f"upsample_2x_{scale}"


def _upsample(path: str, name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(
        path=f"{path}.convolution.weight",
        name=f"{name}.0.weight",
        torch=(inputs, outputs, 2, 2),
        order=(0, 2, 3, 1),
    )
    yield Entry(path=f"{path}.convolution.bias", name=f"{name}.0.bias", torch=(outputs,))
    yield from _norm(f"{path}.norm", f"{name}.1", outputs)


def _transformer(config: ModelConfig, scale: int) -> Iterator[Entry]:
    decoder = config.decoder
    c, n = decoder.width, decoder.heads
    ours = f"pixel_decoder.transformers.{scale}"
    theirs = f"model.mask_decoder.transformer.{scale}"

    def attention(path: str, name: str, inner: int) -> Iterator[Entry]:
        h = inner // n
        for part, proj in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            yield Entry(
                path=f"{ours}.{path}.{part}.weight",
                name=f"{theirs}.{name}.{proj}.weight",
                torch=(inner, c),
                factored=(n, h, c),
                order=(2, 0, 1),
            )
            yield Entry(
                path=f"{ours}.{path}.{part}.bias",
                name=f"{theirs}.{name}.{proj}.bias",
                torch=(inner,),
                factored=(n, h),
            )
        yield Entry(
            path=f"{ours}.{path}.out.weight",
            name=f"{theirs}.{name}.out_proj.weight",
            torch=(c, inner),
            factored=(c, n, h),
            order=(1, 2, 0),
        )
        yield Entry(
            path=f"{ours}.{path}.out.bias", name=f"{theirs}.{name}.out_proj.bias", torch=(c,)
        )

    for i in range(decoder.depth):
        path = f"layers.{i}"
        yield from attention(f"{path}.token_attention", f"{path}.self_attn", c)
        yield from attention(
            f"{path}.token_to_image", f"{path}.cross_attn_token_to_image", decoder.inner
        )
        yield from attention(
            f"{path}.image_to_token", f"{path}.cross_attn_image_to_token", decoder.inner
        )
        for k, norm in enumerate(("token_norm", "image_read_norm", "mlp_norm", "image_norm")):
            yield from _norm(f"{ours}.{path}.{norm}", f"{theirs}.{path}.norm{k + 1}", c)
        mlp = f"{theirs}.{path}.mlp"
        yield from _linear(f"{ours}.{path}.mlp.layers.0", f"{mlp}.lin1", c, decoder.mlp)
        yield from _linear(f"{ours}.{path}.mlp.layers.1", f"{mlp}.lin2", decoder.mlp, c)
    yield from attention("token_to_image", "final_attn_token_to_image", decoder.inner)
    yield from _norm(f"{ours}.norm", f"{theirs}.norm_final_attn", c)


def _fusion(config: ModelConfig) -> Iterator[Entry]:
    for path, constant in released_fusion(config).items():
        yield Entry(path=path, name=f"model.{path}", torch=constant.shape, kind="optional")


def _unused_model(config: ModelConfig) -> Iterator[Entry]:
    """List SAM's prompt encoder and spare heads, and scale 1 where the model has one scale."""
    c, scales, masks = config.decoder.width, config.codebook.scales, config.decoder.mask_tokens
    decoder, encoder = "model.mask_decoder", "model.prompt_encoder"

    def unused(name: str, *torch: int) -> Entry:
        return Entry(name=name, torch=torch, kind="unused")

    for i in range(4):
        yield unused(f"{encoder}.point_embeddings.{i}.weight", 1, c)
    yield unused(f"{encoder}.not_a_point_embed.weight", 1, c)
    for i, shape in (
        (0, (4, 1, 2, 2)),
        (1, (4,)),
        (3, (16, 4, 2, 2)),
        (4, (16,)),
        (6, (c, 16, 1, 1)),
    ):
        yield unused(f"{encoder}.mask_downscaling.{i}.weight", *shape)
        yield unused(f"{encoder}.mask_downscaling.{i}.bias", shape[0])
    mlps = {f"output_hypernetworks_mlps.{i}": config.decoder.upscaled for i in range(1, masks)}
    for stem, outputs in {**mlps, "iou_prediction_head": masks}.items():
        for i, rows in enumerate((c, c, outputs)):
            yield unused(f"{decoder}.{stem}.layers.{i}.weight", rows, c)
            yield unused(f"{decoder}.{stem}.layers.{i}.bias", rows)
    if scales == 1:
        yield unused(f"{decoder}.upsample_2x.0.weight", c, c, 2, 2)
        for part in ("0.bias", "1.weight", "1.bias"):
            yield unused(f"{decoder}.upsample_2x.{part}", c)
        yield unused(f"{decoder}.pe1.positional_encoding_gaussian_matrix", 2, c // 2)


def _unused_vision(config: ModelConfig) -> Iterator[Entry]:
    """List the layers after the deepest tap, and the final norm."""
    vision = config.vision
    e, f = vision.width, vision.mlp

    def unused(name: str, *torch: int) -> Entry:
        return Entry(name=f"vision_model.{name}", torch=torch, source=VISION, kind="unused")

    for i in range(vision.layers_used, vision.layers):
        layer = f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield unused(f"{layer}.{norm}.weight", e)
            yield unused(f"{layer}.{norm}.bias", e)
        for projection, inputs, outputs in (
            *((f"self_attn.{name}", e, e) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            ("mlp.fc1", e, f),
            ("mlp.fc2", f, e),
        ):
            yield unused(f"{layer}.{projection}.weight", outputs, inputs)
            yield unused(f"{layer}.{projection}.bias", outputs)
    yield unused("post_layernorm.weight", e)
    yield unused("post_layernorm.bias", e)
