"""Model sizes that `pixellm bench` accepts by name."""

from __future__ import annotations

from pixellm_jax.config import (
    SIZES,
    DecoderConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)

TINY = ModelConfig(
    vision=VisionConfig(width=64, layers=4, heads=2, mlp=128, canvas=112, table=8, taps=(-2, -3)),
    language=LanguageConfig(
        vocabulary=512, width=128, layers=2, heads=4, kv_heads=4, head=32, mlp=256
    ),
    decoder=DecoderConfig(width=64, heads=4, mlp=128),
    image_grid=4,
    dtype="float32",
    remat=False,
)
"""Smoke-test size: runs anywhere in seconds."""

REF47M = ModelConfig(
    vision=VisionConfig(width=256, layers=12, heads=4, mlp=1024),
    language=LanguageConfig(
        vocabulary=2008, width=512, layers=8, heads=8, kv_heads=8, head=64, mlp=1376
    ),
    dtype="float32",
    remat=False,
)
"""Size at which the public PyTorch reference was timed on a CPU.

CLIP of 256 x 12 layers at 448 pixels, LLaMA of 512 x 8 layers, N = 3 and L = 2, the pixel decoder
as released. The MLP is 7B's scaled with the width, and the vocabulary (2,000 ids and 8 new ones)
makes up the total: 47.4 million parameters as a released checkpoint counts them, of which this
model has 46.1 (without the last CLIP layer, which no tap reaches, and unused tensors).
"""

BENCH_SIZES: dict[str, ModelConfig] = {"tiny": TINY, "ref47m": REF47M, **SIZES}
