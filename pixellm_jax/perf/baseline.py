"""What `pixellm bench --peer` compares with: LLaVA of transformers, in PyTorch.

The only module of the packages that imports PyTorch, and only when it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pixellm_jax.config import ModelConfig
from pixellm_jax.errors import InputError

DEVICES = {"cpu": "cpu", "gpu": "cuda"}
"""PyTorch's names of the devices of JAX that a peer runs on."""


class PeerRun(NamedTuple):
    """Seconds up to the first new id of all rows, and of every later one."""

    prompts: float
    step: float


class Clock:
    """Takes ids as `generate` makes them, and the time."""

    def __init__(self) -> None:
        self.begin, self.times = time.perf_counter(), list[float]()

    def put(self, value: Any) -> None:
        """First of the prompts, then of one id per row."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last id."""

    @property
    def run(self) -> PeerRun:
        """What the times say."""
        _, first, *_, last = self.times
        return PeerRun(first - self.begin, (last - first) / (len(self.times) - 2))


def make_peer(config: ModelConfig) -> Any:
    """CLIP, projector and LLaMA with the shapes of `config` and random weights.

    As in PixelLM, the patches are brought to the grid of image positions before the projector. It
    has no codebook and no pixel decoder.

    Raises:
        InputError: PyTorch is not installed, or not for this device.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError("--peer needs PyTorch: pip install 'pixellm_jax[bench]'") from None
    if (backend := jax.default_backend()) not in DEVICES:
        raise InputError(f"--peer runs on CPU and GPU, JAX on {backend}; leave it")
    device = DEVICES[backend]
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--peer needs a PyTorch that sees the GPU; install one with CUDA")
    vision, language, side = config.vision, config.language, config.image_grid
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
    peer = transformers.LlavaForConditionalGeneration(settings).eval()
    with torch.no_grad():
        peer.lm_head.weight[settings.image_token_index] = 0  # so it is never the most likely id

    def resize(module: Any, inputs: tuple[Any]) -> Any:
        patches = inputs[0].transpose(1, 2).unflatten(2, (vision.grid, vision.grid))
        patches = torch.nn.functional.interpolate(patches, (side, side), mode="bilinear")
        return patches.flatten(2).transpose(1, 2)

    peer.model.multi_modal_projector.register_forward_pre_hook(resize)
    return peer.to(device, getattr(torch, config.dtype))


def answer(peer: Any, *, rows: int, length: int, tokens: int, cache: bool) -> PeerRun:
    """Lets the peer say `tokens` ids after prompts of `length`, the image positions included.

    Without `cache` every id costs a pass through CLIP and the whole sequence, as in the released
    code of PixelLM.
    """
    import torch
    import transformers

    ids, pixels = _inputs(peer, rows, length)
    settings = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    clock = Clock()
    with torch.inference_mode():
        if cache:
            said = peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                generation_config=settings,
                streamer=clock,
            )
            assert said.shape == (rows, length + tokens), "an answer ended early"
            return clock.run
        clock.put(ids)
        for _ in range(tokens):  # `generate` would encode the picture once
            logits = peer(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            clock.put(ids.cpu())  # waits for it, as `generate` does
    return clock.run


def train(peer: Any, *, rows: int, length: int, supervised: int) -> Callable[[], None]:
    """A call that runs forward and backward of the text loss; CLIP, which is frozen, forward alone.

    As in the released code of PixelLM every question has a row of its own, with its picture, both
    of which go through CLIP and the language model. The pixel decoder, its losses and the update
    are left out, in the peer's favour. supervised: ids at the end of every row.
    """
    peer.model.vision_tower.requires_grad_(False)
    ids, pixels = _inputs(peer, rows, length)
    labels = ids.clone()
    labels[:, :-supervised] = -100  # no target, by PyTorch's convention

    def call() -> None:
        peer.zero_grad(set_to_none=True)
        loss = peer(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        loss.item()  # waits for it

    return call


def _inputs(peer: Any, rows: int, length: int) -> tuple[Any, Any]:
    """Random ids with the image positions in their places, and random pictures."""
    import torch

    config, draw = peer.config, torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.image_token_index, (rows, length), generator=draw)
    ids[:, 1 : 1 + config.image_seq_length] = config.image_token_index
    side = config.vision_config.image_size
    pixels = torch.randn(rows, 3, side, side, generator=draw)
    return ids.to(peer.device), pixels.to(peer.device, peer.dtype)
