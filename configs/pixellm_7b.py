"""PixelLM-7B (CVPR 2024, arXiv 2312.02228): CLIP ViT-L/14-336 at 448 pixels and LLaMA 7B.

The recipe of the paper and of the released script: LoRA on the query and value projections,
embeddings, head, projectors, codebook and pixel decoder trained; 5,000 updates of 160 images.

    pixellm train --config configs/pixellm_7b.py --init START --data PREPARED --out runs/7b

START is LLaVA with CLIP, or a released PixelLM, as `pixellm convert` writes them. On 16 devices an
update is 10 micro-batches of one image per device; with other numbers of devices, let data.batch be
a multiple of mesh data x fsdp x accumulation, and validation.batch of data x fsdp. Not trained by
us yet: no scores of our own.

On TPU pods take `--config.train.mesh.tensor=4`: no vocabulary is gathered, and a third of the bytes
travels (docs/benchmarks.md, "Compiling for TPUs"). The default, 1, suits a few GPUs as well.
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
            "model": dataclasses.asdict(SIZES["7b"]),
            "data": dataclasses.asdict(data),
            "train": dataclasses.asdict(TrainConfig(steps=5000, accumulation=10)),
            "validation": dataclasses.asdict(validation),
        }
    )
