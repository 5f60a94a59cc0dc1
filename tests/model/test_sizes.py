"""Full size, without memory: parameter counts from the published shapes, axis names, the table."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import jax
import pytest
from flax import nnx

from pixellm_jax.axes import AXES, LOGICAL
from pixellm_jax.config import (
    SIZES,
    CodebookConfig,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from pixellm_jax.model.layers import Constant
from pixellm_jax.model.pixellm import PixelLM
from pixellm_jax.weights import torch_layout

# D, layers, heads * head size, MLP width of LLaMA; 32,000 ids, 6 codebook tokens, im_start, im_end.
LLAMA = {"7b": (4096, 32, 11008), "13b": (5120, 40, 13824)}
VOCABULARY = 32008

# Known counts of the public models: LLaMA with 32,000 ids, CLIP ViT-L/14-336's vision tower.
PUBLIC_LLAMA = {"7b": 6_738_415_616, "13b": 13_015_864_320}
PUBLIC_CLIP = 303_507_456

FUSION = 3 * 2 + 2  # token fusion (L, N) and mask fusion (L)


def variables(config: ModelConfig) -> dict[str, nnx.Variable]:
    model = jax.eval_shape(partial(PixelLM, config=config), jax.random.key(0))
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}


def count(config: ModelConfig) -> int:
    return sum(math.prod(v.get_value().shape) for v in variables(config).values())


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def llama(size: str, vocabulary: int) -> int:
    d, layers, f = LLAMA[size]
    layer = 4 * d * d + 3 * d * f + 2 * d
    return vocabulary * d + layers * layer + d + vocabulary * d


def clip() -> int:
    """`vision_model.*`: ViT-L, patches of 14 on 336 pixels, no bias on the patches."""
    e, f = 1024, 4096
    layer = 4 * linear(e, e) + linear(e, f) + linear(f, e) + 4 * e
    embeddings = e + 14 * 14 * 3 * e + (24**2 + 1) * e
    return embeddings + 2 * e + 24 * layer + 2 * e


def heads(d: int) -> int:
    """mm_projector and out_mm_projector, text_hidden_fcs, image_feature_neck."""
    projector = linear(1024, 2 * d) + linear(2 * d, d)
    text = linear(d, d) + linear(d, 256)
    neck = 256 * d + 2 * 256 + 256 * 256 * 9 + 2 * 256
    return 2 * projector + text + neck


def prompt_encoder() -> int:
    """SAM's: the matrix, four points and "not a point", mask downscaling 1-4-16-256, no mask."""
    points = 4 * 256 + 256
    downscaling = (4 * 4 + 4) + 2 * 4 + (4 * 16 * 4 + 16) + 2 * 16 + linear(16, 256)
    return 2 * 128 + points + downscaling + 256


def two_way_transformer() -> int:
    """Two layers with 256 wide self attention and 128 wide cross attentions, and a last one."""
    own = 4 * linear(256, 256)
    cross = 3 * linear(256, 128) + linear(128, 256)
    mlp = linear(256, 2048) + linear(2048, 256)
    return 2 * (own + 2 * cross + mlp + 4 * 2 * 256) + cross + 2 * 256


def mask_decoder() -> int:
    tokens = 256 + 4 * 256
    upscaling = 256 * 32 * 4 + 32 + 2 * 32
    upsample_2x = 256 * 256 * 4 + 256 + 2 * 256
    hypernetworks = 4 * (2 * linear(256, 256) + linear(256, 32))
    score = 2 * linear(256, 256) + linear(256, 4)
    level, matrix = 2 * 256, 2 * 128
    parts = tokens + upscaling + upsample_2x + hypernetworks + score + level + matrix
    return 2 * two_way_transformer() + parts


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_unused_tensors_are_those_of_the_published_checkpoints(size):
    config = SIZES[size]
    assert config.language.vocabulary == VOCABULARY
    assert llama(size, 32000) == PUBLIC_LLAMA[size]
    assert clip() == PUBLIC_CLIP
    published = llama(size, VOCABULARY) + clip()
    published += heads(LLAMA[size][0]) + prompt_encoder() + mask_decoder()
    unused = sum(math.prod(entry.torch) for entry in torch_layout.table(config, kind="unused"))
    assert count(config) - FUSION + unused == published


@pytest.mark.parametrize(("size", "parameters"), [("7b", 7_139_791_240), ("13b", 13_469_168_008)])
def test_size_in_parameters_and_in_bfloat16_bytes(size, parameters):
    # 14.3 GB and 26.9 GB in bfloat16, tensors that only an export needs not counted.
    assert count(SIZES[size]) == parameters
    assert 2 * parameters == {"7b": 14_279_582_480, "13b": 26_938_336_016}[size]


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_names_every_axis(size):
    config = SIZES[size]
    widths: dict[str, set[int]] = {}
    for name, variable in variables(config).items():
        assert isinstance(variable, (nnx.Param, Constant)), name
        axes, shape = variable.get_metadata()["axes"].split(), variable.get_value().shape
        assert len(axes) == len(shape), name
        assert set(axes) <= LOGICAL, name
        for axis, width in zip(axes, shape, strict=True):
            widths.setdefault(axis, set()).add(width)
    language, vision, decoder = config.language, config.vision, config.decoder
    single = {
        "embed": language.width,
        "vocab": language.vocabulary,
        "kv_heads": language.kv_heads,
        "vision": vision.width,
        "position": vision.table**2 + 1,
        "decoder": decoder.width,
        "query": decoder.mask_tokens,
        "scale": config.codebook.scales,
        "codebook": config.codebook.tokens_per_scale,
        "colour": 3,
        "coordinate": 2,
        "frequency": decoder.width // 2,
    }
    assert {axis: widths[axis] for axis in single} == {a: {w} for a, w in single.items()}
    assert widths["layer"] == {language.layers, vision.layers_used}
    assert widths["heads"] == {language.heads, vision.heads, decoder.heads}
    assert widths.keys() - single.keys() <= {axis.logical for axis in AXES.values()}


@pytest.mark.parametrize(("scales", "tokens"), [(1, 3), (2, 1), (2, 3), (3, 2)])
def test_table_names_every_parameter_once_with_its_shape(scales, tokens):
    # Every width differs, so that an axis in the wrong place is a wrong shape.
    config = ModelConfig(
        vision=VisionConfig(
            width=35,
            heads=7,
            layers=5,
            mlp=29,
            patch=3,
            canvas=33,
            table=13,
            taps=(-2, 1, 3)[:scales],
        ),
        language=LanguageConfig(
            vocabulary=101, width=43, layers=2, heads=6, kv_heads=3, head=10, mlp=23
        ),
        codebook=CodebookConfig(scales=scales, tokens_per_scale=tokens),
        decoder=DecoderConfig(width=48, heads=3, mlp=19, depth=3, mask_tokens=11),
    )
    ours = {path: v.get_value().shape for path, v in variables(config).items()}
    entries = torch_layout.table(config, kind="required")
    paths = Counter(entry.path for entry in entries)
    assert set(paths.values()) == {1}
    assert ours.keys() - paths.keys() == {"codebook.token_fusion", "codebook.mask_fusion"}
    assert ours.keys() - paths.keys() == {
        entry.path for entry in torch_layout.table(config, kind="optional")
    }
    assert not paths.keys() - ours.keys()
    assert {entry.path: entry.shape for entry in entries} == {path: ours[path] for path in paths}
    names = Counter(name for entry in entries for name in entry.names)
    names.update(entry.name for entry in torch_layout.table(config, kind="unused"))
    assert set(names.values()) == {1}  # no tensor is read twice, or both read and unused
