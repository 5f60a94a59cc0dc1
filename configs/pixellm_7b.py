"""PixelLM-7B (CVPR 2024, arXiv 2312.02228): CLIP ViT-L/14-336 at 448 pixels and LLaMA 7B.

The model only; the training recipe joins it when training lands.
"""

import dataclasses

import ml_collections

from pixellm_jax.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    """The recipe as a ConfigDict; `pixellm_jax.config.from_mapping` turns it into dataclasses."""
    return ml_collections.ConfigDict({"model": dataclasses.asdict(SIZES["7b"])})
