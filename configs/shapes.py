"""A small PixelLM, trained from scratch to answer questions about coloured shapes with masks.

python scripts/train.py --config=configs/shapes.py --out runs/shapes --model-dtype bfloat16

The package ships the model of this command (`pixellm_jax/assets/shapes_model`, 2.6 M parameters):
11,000 steps, 87 minutes on 2 cores of a shared virtual machine that was partly busy with other work
(median 0.44 seconds per step), Python 3.11, jax 0.10.2. It was run once.

On 5,000 held-out questions (`pixellm evaluate --benchmark shapes`, free-running): gIoU 0.938, cIoU
0.942, the right number of targets in 94.9 % of the answers, and no target in 96.4 % of the answers
about an absent object. The weakest kinds of questions are about sides and ninths of the image: the
number of targets is right in 79 % of the relations and 88 % of the ninths, and in 35 of 53 cases
where nothing lies on a side (docs/benchmarks.md).

The values are in `pixellm_jax/experiments/shapes_recipe.py`, which `pixellm demo --train` shares.
"""

import ml_collections

from pixellm_jax.experiments.shapes_recipe import shapes_recipe


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe as a ConfigDict."""
    return shapes_recipe().as_config_dict()
