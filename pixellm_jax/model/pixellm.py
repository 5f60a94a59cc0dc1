"""PixelLM: image and text in, states, next-token logits and masks out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Num

from pixellm_jax.batch import Batch, Prediction
from pixellm_jax.config import ModelConfig
from pixellm_jax.model.codebook import Codebook
from pixellm_jax.model.language_model import LanguageModel
from pixellm_jax.model.layers import MLP, gelu, resize_bilinear
from pixellm_jax.model.pixel_decoder import PixelDecoder
from pixellm_jax.model.vision_encoder import VisionEncoder, image_token_valid, patch_valid
from pixellm_jax.sharding import constrain

SCALES = "batch scale patch embed"


class ImageFeatures(NamedTuple):
    """Features of an image, computed once and used by every question and target.

    Attributes:
        tokens: image tokens for the language model.
        token_valid: the token is not padding of the canvas.
        maps: feature maps for the pixel decoder, by scale.
    """

    tokens: Float[Array, "b i d"]
    token_valid: Bool[Array, "b i"]
    maps: tuple[Float[Array, "b y x c"], ...]


class PixelLM(nnx.Module):
    """PixelLM: vision encoder, projectors, language model, segmentation codebook, pixel decoder."""

    def __init__(self, key: Key[Array, ""], config: ModelConfig) -> None:
        self.config = config
        keys = iter(jax.random.split(key, 6))
        d, e = config.language.width, config.vision.width
        self.vision_encoder = VisionEncoder(next(keys), config.vision, remat=config.remat)
        widths, axes = (e, 2 * d, d), "vision mlp embed"
        self.image_projector = MLP(next(keys), widths, axes, gelu)
        self.mask_projector = MLP(next(keys), widths, axes, gelu)
        self.language_model = LanguageModel(next(keys), config.language, remat=config.remat)
        self.codebook = Codebook(next(keys), config)
        self.pixel_decoder = PixelDecoder(next(keys), config)

    def __call__(self, batch: Batch, dropout: Key[Array, ""] | None = None) -> Prediction:
        """Run the teacher-forced forward pass over packed sequences: one pass per image.

        `dropout` samples the dropout of LoRA pairs, in training.
        """
        image = self.encode_image(batch.image, batch.image_hw)
        x = self.embed(batch.tokens, image.tokens)
        visible = visibility(batch.segment, self.token_valid(batch.tokens, image.token_valid))
        hidden = self.language_model(x, batch.position, visible, dropout)
        return Prediction(
            hidden=hidden,
            text_logits=self.language_model.logits(hidden),
            mask_logits=self.decode_masks(gather_states(hidden, batch.codebook_index), image.maps),
        )

    def encode_image(
        self, image: Num[Array, "b y x 3"], image_hw: Int[Array, "b 2"]
    ) -> ImageFeatures:
        """Run the vision encoder and everything else that depends on the image only."""
        config = self.config
        grid, side = config.vision.grid, config.image_grid
        valid = patch_valid(image_hw, config.vision)
        taps = self.vision_encoder(self.normalise(image, image_hw), valid)
        b, _, e = taps[0].shape
        resized = resize_bilinear(taps[0].reshape(b, grid, grid, e), side, side)
        projected = constrain(self.mask_projector(jnp.stack(taps, axis=1)), SCALES)
        return ImageFeatures(
            tokens=self.image_projector(resized.reshape(b, side**2, e)),
            token_valid=image_token_valid(valid, side),
            maps=self.pixel_decoder.features(projected.reshape(b, len(taps), grid, grid, -1)),
        )

    def normalise(self, image: Num[Array, "b y x 3"], image_hw: Int[Array, "b 2"]) -> Array:
        """Normalise u8 RGB: (x - mean) / std on 0..255 in the compute dtype, zero in the padding.

        Padding is zero *after* normalisation (the mean colour). Float images are only cast.
        """
        dtype = jnp.dtype(self.config.dtype)
        if image.dtype != jnp.uint8:
            return image.astype(dtype)
        mean, std = jnp.asarray(self.config.pixel_mean), jnp.asarray(self.config.pixel_std)
        pixels = (image.astype(jnp.float32) - mean) / std
        rows, columns = (
            jnp.arange(image.shape[1 + axis]) < image_hw[:, axis, None] for axis in (0, 1)
        )
        inside = rows[:, :, None, None] & columns[:, None, :, None]
        return jnp.where(inside, pixels, 0).astype(dtype)

    def embed(
        self, tokens: Int[Array, "b t"], image_tokens: Float[Array, "b i d"]
    ) -> Float[Array, "b t d"]:
        """Embed ids; the image positions (negative ids) take the image tokens in order."""
        text = self.language_model.embed(tokens).astype(image_tokens.dtype)
        image = jnp.take_along_axis(image_tokens, _image_rank(tokens, image_tokens)[..., None], 1)
        return jnp.where((tokens < 0)[..., None], image, text)

    def token_valid(
        self, tokens: Int[Array, "b t"], image_valid: Bool[Array, "b i"]
    ) -> Bool[Array, "b t"]:
        """Return the positions that may be attended to: all text, and valid image positions."""
        rank = _image_rank(tokens, image_valid)
        return (tokens >= 0) | jnp.take_along_axis(image_valid, rank, axis=1)

    def decode_masks(
        self, states: Float[Array, "b m s k d"], maps: tuple[Float[Array, "b ... c"], ...]
    ) -> Float[Array, "b m Y X"]:
        """Decode the states before the codebook tokens of each target to fused mask logits."""
        queries = self.codebook.fuse_tokens(states)
        return self.codebook.fuse_masks(self.pixel_decoder(maps, queries))


def visibility(segment: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Bool[Array, "b t u"]:
    """Return the attention mask of packed sequences, [b t u]: position t attends to u.

    A token attends to earlier valid positions of the prefix and of its own conversation. Nothing
    attends to padding (segment -1); padding attends to the prefix, so that its softmax is finite.
    """
    length = segment.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment[:, :, None] == segment[:, None, :]
    prefix = (segment == 0)[:, None, :]
    not_padding = (valid & (segment >= 0))[:, None, :]
    return causal & (same | prefix) & not_padding


def gather_states(
    hidden: Float[Array, "b t d"], index: Int[Array, "b m s k"]
) -> Float[Array, "b m s k d"]:
    """Gather the states at the given sequence positions.

    Empty target slots may have any index. One out of range is clipped: the NaN that JAX would
    return by default would spoil the gradient of every other target.
    """
    index_in_row = index.reshape(index.shape[0], -1, 1)
    flat = jnp.take_along_axis(hidden, index_in_row, axis=1, mode="clip")
    return flat.reshape(*index.shape, hidden.shape[-1])


def _image_rank(tokens: Int[Array, "b t"], image: Array) -> Array:
    """Return, for image positions, the index of the image token at each."""
    return jnp.clip(jnp.cumsum(tokens < 0, axis=1) - 1, 0, image.shape[1] - 1)
