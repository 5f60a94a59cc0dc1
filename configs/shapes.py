"""A small PixelLM that learns from nothing to answer questions about coloured shapes with masks.

python scripts/train.py --config=configs/shapes.py --out runs/shapes --model-dtype bfloat16

The package ships the model of this command (`pixellm_jax/assets/shapes_model`, 2.6 M parameters):
11,000 steps, 87 minutes on 2 cores of a shared virtual machine, a part of them taken by other work
(0.44 seconds per step in the median), Python 3.11, jax 0.10.2. It was run once.

Of 5,000 held-out questions (`pixellm evaluate --benchmark shapes`, the words its own): gIoU 0.938,
cIoU 0.942, the right number of targets in 94.9 % of the answers, 96.4 % of the questions about what
is not there answered so. What is left to learn are sides and ninths of the picture: the number is
right in 79 % of the relations and 88 % of the ninths, and where nothing lies on a side, 35 times in
53 (docs/benchmarks.md).
"""

import ml_collections

from pixellm_jax.experiments.shapes_recipe import shapes_recipe


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe as a ConfigDict."""
    return shapes_recipe().as_config_dict()
