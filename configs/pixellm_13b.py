"""PixelLM-13B (CVPR 2024, arXiv 2312.02228): CLIP ViT-L/14-336 at 448 pixels and LLaMA 13B.

The recipe of the paper and of the released script: LoRA on the query and value projections,
embeddings, head, projectors, codebook and pixel decoder trained; 5,000 updates of 160 images.

    pixellm train --config configs/pixellm_13b.py --init START --data PREPARED --out runs/13b

START is LLaVA with CLIP, or a released PixelLM, as `pixellm convert` writes them. On 16 devices an
update is 10 micro-batches of one image per device; with other numbers of devices, let data.batch be
a multiple of mesh data x fsdp x accumulation. Not trained by us yet: no scores of our own.
"""

import dataclasses

import ml_collections

from data_pipeline.config import DataConfig, FamilyConfig
from pixellm_jax.config import SIZES
from pixellm_jax.training.config import TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The recipe as a ConfigDict."""
    data = DataConfig(batch=160, length=1024, targets=32, workers=8)
    validation = dataclasses.replace(
        data, families=(FamilyConfig(weight=1.0, datasets=("reasonseg/val",)),), batch=16, seed=1
    )
    return ml_collections.ConfigDict(
        {
            "model": dataclasses.asdict(SIZES["13b"]),
            "data": dataclasses.asdict(data),
            "train": dataclasses.asdict(TrainConfig(steps=5000, accumulation=10)),
            "validation": dataclasses.asdict(validation),
        }
    )
