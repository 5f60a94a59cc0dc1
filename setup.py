"""Packaging of pixellm_jax. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Return `__version__` of the package without importing it."""
    text = (ROOT / "pixellm_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('pixellm_jax/__init__.py has no line `__version__ = "..."`.')
    return match.group(1)


setup(
    name="pixellm_jax",
    version=version(),
    description="PixelLM in JAX: questions about an image, answered with text and pixel masks.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["pixellm_jax*", "data_pipeline*"]),
    # Orbax writes files without an extension.
    package_data={
        "": ["*.css", "*.json", "*.txt", "py.typed"],
        "pixellm_jax": ["assets/**"],
        "data_pipeline": ["sources/shapes/tokenizer_files/*.json"],
    },
    entry_points={"console_scripts": ["pixellm = pixellm_jax.cli.main:main"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flatbuffers>=24",  # `jax.export` serializes with it
        "flax>=0.12.8,<0.13",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.8,<0.13",
        "transformers>=5",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "absl-py>=2",
        "array-record>=0.8",
        "jaxtyping>=0.3",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "pillow>=11",
        "protobuf>=5",
        "pycocotools>=2.0.8",
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.74",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "beartype>=0.20",
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "openai>=3",
            "rouge-score>=0.1.2",
        ],
        # `pixellm judge` with a language model.
        "judge": ["openai>=3"],
        # Text scores of answers (`pixellm_jax.evaluation.text_scores`).
        "text": ["rouge-score>=0.1.2"],
        # `pixellm data-stats --out`.
        "figures": ["matplotlib>=3.9"],
        # `pixellm train --wandb`.
        "wandb": ["wandb>=0.19"],
        # `pixellm compile`; libtpu is 0.7 GB.
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        # `pixellm prepare --runner`. Beam requires older protobuf 6, pillow 12 and pyarrow 25.
        "beam": ["apache-beam>=2.77"],
        # The PyTorch oracles of tests/parity. One pinned release: newer ones pull in gigabytes.
        "parity": ['torch==2.13.0; python_version < "3.12"'],
        # `pixellm bench generate --peer`: LLaVA of transformers, on a CPU.
        "bench": ["torch==2.13.0"],
        "dev": ["ruff>=0.17,<0.18", "mypy>=2.0", "types-tqdm"],
    },
)
