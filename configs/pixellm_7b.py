"""PixelLM-7B (CVPR 2024, arXiv 2312.02228): CLIP ViT-L/14-336 at 448 pixels and LLaMA 7B.

The recipe of the paper and of the released script: LoRA on the query and value projections;
embeddings, head, projectors, codebook and pixel decoder trained in full; 5,000 updates of 160
images. The values are in `released_recipe` of `pixellm_jax/experiments/recipe.py`.

    pixellm train --config configs/pixellm_7b.py --init START --data PREPARED --out runs/7b

START is LLaVA with CLIP, or a released PixelLM, as `pixellm convert` writes them. On 16 devices an
update is 10 micro-batches of one image per device; on other numbers of devices, data.batch must be
a multiple of mesh data x fsdp x accumulation, and validation.batch of data x fsdp. We have not
trained this model yet, so there are no scores.

On TPU pods, use `--config.train.mesh.tensor=4`: the vocabulary is never gathered, and a third of
the bytes is communicated (docs/benchmarks.md, "Compiling for TPUs"). The default, 1, also suits a
few GPUs.
"""

import ml_collections

from pixellm_jax.experiments.recipe import released_recipe


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe as a ConfigDict."""
    return released_recipe("7b").as_config_dict()
