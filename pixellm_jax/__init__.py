"""Pixel-level reasoning with large multimodal models: PixelLM in JAX.

The public names are imported on first use, so that `import pixellm_jax` loads neither JAX nor a
data library.

Example:
    >>> from pixellm_jax import Predictor
    >>> predictor = Predictor.load("pixellm-7b")
    >>> answer = predictor(image, "Please segment the dog.")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixellm_jax.config import ModelConfig
    from pixellm_jax.errors import InputError
    from pixellm_jax.inference.answer import Answer
    from pixellm_jax.inference.predictor import ChatSession, Predictor
    from pixellm_jax.weights.checkpoint import load_model

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "ChatSession",
    "InputError",
    "ModelConfig",
    "Predictor",
    "__version__",
    "load_model",
]

_MODULES = {
    "Answer": "pixellm_jax.inference.answer",
    "ChatSession": "pixellm_jax.inference.predictor",
    "InputError": "pixellm_jax.errors",
    "ModelConfig": "pixellm_jax.config",
    "Predictor": "pixellm_jax.inference.predictor",
    "load_model": "pixellm_jax.weights.checkpoint",
}
"""Public name -> module that defines it (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
