"""The released PyTorch layout <-> our parameters: one declared table, read both ways.

Names and shapes are those of the published checkpoints (docs/reference_notes.md 6.3), not of the
class attributes of today's transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from pixellm_jax.config import ModelConfig

MODEL, VISION = "model", "vision"
"""The two source folders: PixelLM (or LLaVA), and CLIP."""

IGNORED = {
    MODEL: ("model.vision_tower.", "model.mm_projector.weight", "model.mm_projector.bias"),
    VISION: ("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
}
"""Prefixes of tensors that a folder may hold and that PixelLM has no use for: the vision tower is
read from its own folder, LLaVA's linear projector is not PixelLM's, CLIP has a text side."""

FUSION = {
    "codebook.token_fusion": "model.codebook.token_fusion",
    "codebook.mask_fusion": "model.codebook.mask_fusion",
}
"""Our fusion weights, constants in the released model: a folder holds them only once trained."""

DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Suffixes of buffers that follow from the config; carried along so that export is complete."""


@runtime_checkable
class Tensor(Protocol):
    """An array that can be read when it is wanted (`tensor_files.LazyTensor`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of ours and the tensor, or the stack of tensors, that it is made of.

    The file's `torch` shape is reshaped to `factored`, then transposed by `order`; `count` > 0 says
    that `name` holds a `{}` for 0..count-1, stacked along a new first axis.
    """

    path: str
    name: str
    torch: tuple[int, ...]
    factored: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    count: int = 0
    source: str = MODEL

    @property
    def names(self) -> list[str]:
        """The file's names, in stacking order."""
        return [self.name.format(i) for i in range(self.count)] if self.count else [self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape."""
        factored = self.factored or self.torch
        ours = tuple(factored[axis] for axis in self.order) if self.order else factored
        return (self.count, *ours) if self.count else ours

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One tensor of the file -> one layer of ours."""
        array = array.reshape(self.factored or self.torch)
        return array.transpose(self.order) if self.order else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """One layer of ours -> one tensor of the file."""
        array = array.transpose(np.argsort(self.order)) if self.order else array
        return np.ascontiguousarray(array.reshape(self.torch))


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter that the released layout holds; the fusion weights are not among them."""
    return [*_language(config), *_vision(config), *_heads(config), *_decoder(config)]


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


def released_fusion(config: ModelConfig) -> dict[str, np.ndarray]:
    """The fusion constants of the released model by our paths: 1/(N L) and 1/L, float32."""
    s, k = config.codebook.scales, config.codebook.tokens_per_scale
    return {
        "codebook.token_fusion": np.full((s, k), 1 / (s * k), np.float32),
        "codebook.mask_fusion": np.full((s,), 1 / s, np.float32),
    }


def upsample_name(scale: int) -> str:
    """Scale 1 has the released name; further scales, which the release lacks, are numbered."""
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
    ours, theirs = f"pixel_decoder.transformers.{scale}", f"model.mask_decoder.transformer.{scale}"

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


def unused(config: ModelConfig, source: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that the layout holds and no forward pass of PixelLM reads.

    They are kept beside the parameters so that export writes a complete folder, bit for bit.
    """
    layer: dict[str, tuple[int, ...]]
    prompt: dict[str, tuple[int, ...]]
    decoder: dict[str, tuple[int, ...]] = {}
    c, scales, masks = config.decoder.width, config.codebook.scales, config.decoder.mask_tokens
    if source == VISION:
        e, f = config.vision.width, config.vision.mlp
        layer = {f"layer_norm{k}.{part}": (e,) for k in (1, 2) for part in ("weight", "bias")}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= {f"self_attn.{name}.weight": (e, e), f"self_attn.{name}.bias": (e,)}
        layer |= {"mlp.fc1.weight": (f, e), "mlp.fc1.bias": (f,)}
        layer |= {"mlp.fc2.weight": (e, f), "mlp.fc2.bias": (e,)}
        rest = range(config.vision.layers_used, config.vision.layers)
        shapes = {f"encoder.layers.{i}.{k}": shape for i in rest for k, shape in layer.items()}
        shapes |= {"post_layernorm.weight": (e,), "post_layernorm.bias": (e,)}
        return {f"vision_model.{name}": shape for name, shape in shapes.items()}
    prompt = {f"point_embeddings.{i}.weight": (1, c) for i in range(4)}
    prompt |= {"not_a_point_embed.weight": (1, c)}
    for i, shape in (
        (0, (4, 1, 2, 2)),
        (1, (4,)),
        (3, (16, 4, 2, 2)),
        (4, (16,)),
        (6, (c, 16, 1, 1)),
    ):
        prompt |= {f"mask_downscaling.{i}.weight": shape, f"mask_downscaling.{i}.bias": shape[:1]}
    mlps = {f"output_hypernetworks_mlps.{i}": config.decoder.upscaled for i in range(1, masks)}
    for stem, outputs in {**mlps, "iou_prediction_head": masks}.items():
        for i, rows in enumerate((c, c, outputs)):
            decoder |= {f"{stem}.layers.{i}.weight": (rows, c), f"{stem}.layers.{i}.bias": (rows,)}
    if scales == 1:
        decoder |= {"upsample_2x.0.weight": (c, c, 2, 2)}
        decoder |= {f"upsample_2x.{part}": (c,) for part in ("0.bias", "1.weight", "1.bias")}
        decoder |= {"pe1.positional_encoding_gaussian_matrix": (2, c // 2)}
    return {
        **{f"model.prompt_encoder.{name}": shape for name, shape in prompt.items()},
        **{f"model.mask_decoder.{name}": shape for name, shape in decoder.items()},
    }
