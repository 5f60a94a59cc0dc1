"""The composition: image and text in, states, next tokens and masks out."""

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
    """All that is ever needed of an image: computed once, used by every question and target.

    tokens: what the language model sees; token_valid: not padding of the canvas.
    maps: the pixel decoder's [b y x c], scale by scale.
    """

    tokens: Float[Array, "b i d"]
    token_valid: Bool[Array, "b i"]
    maps: tuple[Float[Array, "b y x c"], ...]


class PixelLM(nnx.Module):
    """Vision encoder, projectors, language model, segmentation codebook, pixel decoder."""

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
        """Teacher-forced pass over packed sequences: one vision and one language pass per image.

        `dropout`: draws that of LoRA pairs, in training.
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
        """Runs the vision encoder and everything else that depends on the image alone."""
        config = self.config
        grid, side = config.vision.grid, config.image_grid
        valid = patch_valid(image_hw, config.vision)
        taps = self.vision_encoder(self.normalise(image, image_hw), valid)
        b, _, e = taps[0].shape
        seen = resize_bilinear(taps[0].reshape(b, grid, grid, e), side, side)
        projected = constrain(self.mask_projector(jnp.stack(taps, axis=1)), SCALES)
        return ImageFeatures(
            tokens=self.image_projector(seen.reshape(b, side**2, e)),
            token_valid=image_token_valid(valid, side),
            maps=self.pixel_decoder.features(projected.reshape(b, len(taps), grid, grid, -1)),
        )

    def normalise(self, image: Num[Array, "b y x 3"], image_hw: Int[Array, "b 2"]) -> Array:
        """u8 RGB to the compute dtype: (x - mean) / std on 0..255, zero outside the picture.

        Padding is zero *after* normalisation (the mean colour). Float images pass as they are.
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
        """Embeddings of ids; the image positions (negative ids) take the image tokens in order."""
        text = self.language_model.embed(tokens).astype(image_tokens.dtype)
        seen = jnp.take_along_axis(image_tokens, _image_rank(tokens, image_tokens)[..., None], 1)
        return jnp.where((tokens < 0)[..., None], seen, text)

    def token_valid(
        self, tokens: Int[Array, "b t"], image_valid: Bool[Array, "b i"]
    ) -> Bool[Array, "b t"]:
        """Positions that may be attended to: all text, and image positions inside the picture."""
        rank = _image_rank(tokens, image_valid)
        return (tokens >= 0) | jnp.take_along_axis(image_valid, rank, axis=1)

    def decode_masks(
        self, states: Float[Array, "b m s k d"], maps: tuple[Float[Array, "b ... c"], ...]
    ) -> Float[Array, "b m Y X"]:
        """States before the codebook tokens of each target -> fused mask logits, all at once."""
        queries = self.codebook.fuse_tokens(states)
        return self.codebook.fuse_masks(self.pixel_decoder(maps, queries))


def visibility(segment: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Bool[Array, "b t u"]:
    """Who sees whom in a packed sequence: earlier valid positions of the prefix and one's own part.

    Padding (segment -1) is seen by nobody; it sees the prefix, so that its softmax is finite.
    """
    length = segment.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    own = segment[:, :, None] == segment[:, None, :]
    prefix = (segment == 0)[:, None, :]
    seen = (valid & (segment >= 0))[:, None, :]
    return causal & (own | prefix) & seen


def gather_states(
    hidden: Float[Array, "b t d"], index: Int[Array, "b m s k"]
) -> Float[Array, "b m s k d"]:
    """The states at the given sequence positions.

    Indices of empty target slots may be anything: outside the sequence they take its first or last
    state, because the NaN that JAX would put there ruins the gradient of every other target.
    """
    index_in_row = index.reshape(index.shape[0], -1, 1)
    flat = jnp.take_along_axis(hidden, index_in_row, axis=1, mode="clip")
    return flat.reshape(*index.shape, hidden.shape[-1])


def _image_rank(tokens: Int[Array, "b t"], image: Array) -> Array:
    """For image positions, which of the image's tokens stands there."""
    return jnp.clip(jnp.cumsum(tokens < 0, axis=1) - 1, 0, image.shape[1] - 1)
