"""PyTorch baseline of the benchmarks: LLaVA of transformers (`pixellm bench --peer`).

The only module of the packages that imports PyTorch, and only when a baseline is built.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError

TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
"""PyTorch's device names by JAX backend, where the baseline runs."""


class BaselineRun(NamedTuple):
    """Measured times of one generation.

    Attributes:
        prefill: seconds until the first new id of all rows.
        step: seconds of every later id.
    """

    prefill: float
    step: float


class TokenTimer:
    """Streamer for `generate` that records when each id arrives."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.times = list[float]()

    def put(self, value: Any) -> None:
        """Record a call: the first one passes the prompts, every later one an id per row."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; `generate` calls this after the last id."""

    @property
    def run(self) -> BaselineRun:
        _, first, *_, last = self.times
        return BaselineRun(first - self.begin, (last - first) / (len(self.times) - 2))


def make_baseline(config: ModelConfig) -> Any:
    """Build CLIP, projector and LLaMA with the shapes of `config` and random weights.

    As in PixelLM, the patches are resized to the grid of image positions before the projector. The
    baseline has no codebook and no pixel decoder.

    Raises:
        InputError: PyTorch is not installed, or not for this device.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError("--peer needs PyTorch: pip install 'pixellm_jax[bench]'") from None
    if (backend := jax.default_backend()) not in TORCH_DEVICES:
        raise InputError(f"--peer runs on CPU and GPU, but JAX runs on {backend}; leave it out")
    device = TORCH_DEVICES[backend]
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--peer needs a PyTorch that sees the GPU; install one with CUDA")
    vision = config.vision
    language = config.language
    side = config.image_grid
    settings = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.canvas,
            patch_size=vision.patch,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=language.vocabulary,
            hidden_size=language.width,
            intermediate_size=language.mlp,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            head_dim=language.head,
            max_position_embeddings=language.max_positions,
            bos_token_id=None,
            eos_token_id=None,
        ),
        image_token_index=language.vocabulary - 1,
        image_seq_length=config.image_tokens,
        vision_feature_layer=vision.taps[0],
    )
    torch.manual_seed(0)
    baseline = transformers.LlavaForConditionalGeneration(settings).eval()
    with torch.no_grad():
        # A zero row, so that the image token is never the most likely id.
        baseline.lm_head.weight[settings.image_token_index] = 0

    def resize(module: Any, inputs: tuple[Any]) -> Any:
        patches = inputs[0].transpose(1, 2).unflatten(2, (vision.grid, vision.grid))
        patches = torch.nn.functional.interpolate(patches, (side, side), mode="bilinear")
        return patches.flatten(2).transpose(1, 2)

    baseline.model.multi_modal_projector.register_forward_pre_hook(resize)
    return baseline.to(device, getattr(torch, config.dtype))


def generate(baseline: Any, *, rows: int, length: int, tokens: int, cache: bool) -> BaselineRun:
    """Generate `tokens` ids per row and return the measured times.

    Args:
        baseline: model of `make_baseline`.
        rows: batch size.
        length: ids of a prompt, image positions included.
        tokens: new ids of each row.
        cache: keep keys and values. Without a cache every id costs a forward pass through CLIP and
            the full sequence, as in the released code of PixelLM.
    """
    import torch
    import transformers

    ids, pixels = _inputs(baseline, rows, length)
    settings = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    timer = TokenTimer()
    with torch.inference_mode():
        if cache:
            output = baseline.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                generation_config=settings,
                streamer=timer,
            )
            assert output.shape == (rows, length + tokens), "an answer ended early"
            return timer.run
        timer.put(ids)
        for _ in range(tokens):  # `generate` would encode the image only once
            logits = baseline(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            timer.put(ids.cpu())  # waits for the device, as `generate` does
    return timer.run


def make_train_step(
    baseline: Any, *, rows: int, length: int, supervised: int
) -> Callable[[], None]:
    """Return a function that runs forward and backward of the text loss; CLIP is frozen.

    As in the released code of PixelLM every question has a row of its own with its image, and both
    go through CLIP and the language model. The pixel decoder, its losses and the update are left
    out, in favour of the baseline.

    Args:
        baseline: model of `make_baseline`.
        rows: batch size.
        length: ids of a row, image positions included.
        supervised: ids at the end of every row that the loss covers.
    """
    baseline.model.vision_tower.requires_grad_(False)
    ids, pixels = _inputs(baseline, rows, length)
    labels = ids.clone()
    labels[:, :-supervised] = -100  # PyTorch's mark of unsupervised positions

    def step() -> None:
        baseline.zero_grad(set_to_none=True)
        loss = baseline(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        loss.item()  # waits for the device

    return step


def _inputs(baseline: Any, rows: int, length: int) -> tuple[Any, Any]:
    """Return random ids with the image positions in place, and random images."""
    import torch

    config = baseline.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.image_token_index, (rows, length), generator=generator)
    ids[:, 1 : 1 + config.image_seq_length] = config.image_token_index
    side = config.vision_config.image_size
    pixels = torch.randn(rows, 3, side, side, generator=generator)
    return ids.to(baseline.device), pixels.to(baseline.device, baseline.dtype)
