"""PixelLM-13B (CVPR 2024, arXiv 2312.02228): CLIP ViT-L/14-336 at 448 pixels and LLaMA 13B.

The recipe of the paper and of the released script: LoRA on the query and value projections;
embeddings, head, projectors, codebook and pixel decoder trained in full; 5,000 updates of 160
images. The values are in `released_recipe` of `pixellm_jax/experiments/recipe.py`.

    pixellm train --config configs/pixellm_13b.py --init START --data PREPARED --out runs/13b

START is LLaVA with CLIP, or a released PixelLM, as `pixellm convert` writes them. On 16 devices an
update is 10 micro-batches of one image per device; on other numbers of devices, data.batch must be
a multiple of mesh data x fsdp x accumulation. We have not trained this model yet, so there are no
scores.
"""

import ml_collections

from pixellm_jax.experiments.recipe import released_recipe


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe as a ConfigDict."""
    return released_recipe("13b").as_config_dict()
