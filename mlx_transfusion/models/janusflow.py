"""JanusFlow (arXiv 2411.07975): a language model that reads pictures through SigLIP and paints by rectified flow.

Understanding and painting go separate ways into one causal Llama. A user's picture is SigLIP's features, one token a
patch, behind a learned vector that begins it. A picture being painted is its noisy latent in ConvNeXt patches behind
one token that is the time; the decoder turns the hidden states of the patches into the velocity of a rectified flow,
with the encoder's output beside them. Attention is causal everywhere, in pictures too.

The latents are those of the SDXL autoencoder times its scaling factor, which gives them unit standard deviation (up
to what that factor was rounded to): they are `velocity`'s data as they are, cut into patches. Parameter names are the
official ones, without the two wrappers around the vision tower and the language model's decoder.
Shapes: B rows, T positions, D width, N patches of P numbers, L latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.convnext import PictureDecoder, PictureEncoder
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.flow_time import flow_velocity
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.models.patches import patchify, unpatchify
from mlx_transfusion.models.siglip import Siglip

TIME_SCALE = 1000.0
"""What the network is told at the end of the flow (data); 0 is noise."""


class JanusFlow(PictureFamily):
    """Reads and writes text, reads pictures (SigLIP), paints pictures (rectified flow)."""

    def __init__(self, config: JanusFlowConfig) -> None:
        super().__init__()
        self._config = config
        width, vision, painting = config.text.hidden_size, config.vision, config.painting
        self.vision_und_enc_model = Siglip(vision)
        self.vision_und_enc_aligner = nn.Linear(vision.hidden_size, width)
        self.beg_of_und_embed = mx.zeros((1, width))
        self.vision_gen_enc_model = PictureEncoder(painting, width)
        self.vision_gen_enc_aligner = nn.Linear(painting.channels, width)
        self.language_model = Llama(config.text)
        self.vision_gen_dec_aligner_norm = nn.RMSNorm(width, eps=config.text.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(width, painting.channels)
        self.vision_gen_dec_model = PictureDecoder(painting, width)
        if config.autoencoder is not None:
            self.autoencoder = AutoencoderKL(config.autoencoder)

    @property
    def config(self) -> JanusFlowConfig:
        """The configuration the model was built from."""
        return self._config

    # ---- plain passes on token vectors --------------------------------------------------------------------------

    def picture_vectors(self, pixels: mx.array) -> mx.array:
        """What the language model reads of pictures [B, S, S, 3] in [-1, 1]: [B, 1 + patches, D].

        The first vector stands in the place of begin-of-image.
        """
        features = self.vision_und_enc_aligner(self.vision_und_enc_model(pixels))
        begin = mx.broadcast_to(self.beg_of_und_embed[None], (features.shape[0], 1, features.shape[-1]))
        return mx.concatenate([begin, features], 1)

    def noisy_vectors(self, z: mx.array, t: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What the language model reads of latents z [B, H, W, L] at times t [B], 0 (noise) to 1 (data).

        Returns [B, 1 + N, D], the time first, the encoder's grid [B, h, w, C], and the time [B, D] for the decoder.
        """
        grid, time = self.vision_gen_enc_model(z, t * TIME_SCALE)
        tokens = self.vision_gen_enc_aligner(grid.reshape(grid.shape[0], -1, grid.shape[-1]))
        return mx.concatenate([time[:, None], tokens], 1), grid, time

    def flow_from_hidden(self, hidden: mx.array, grid: mx.array, time: mx.array) -> mx.array:
        """Hidden states [B, N, D] of the patches -> dz/dt = data - noise [B, H, W, L]."""
        x = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden))
        return self.vision_gen_dec_model(x.reshape(grid.shape), grid, time)

    def flow(self, z: mx.array, t: mx.array, cache: KVCache) -> mx.array:
        """The network's own velocity dz/dt [B, H, W, L] of latents [B, H, W, L] at times [B] behind the cache."""
        vectors, grid, time = self.noisy_vectors(z.astype(self._dtype), t)
        hidden = self._read(vectors, np.ones(vectors.shape[:2], bool), cache, store=False)
        return self.flow_from_hidden(hidden[:, 1:], grid, time)

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, latent numbers in a patch)."""
        c = self.config.painting
        return c.grid**2, c.latent_channels * c.patch_size**2

    @property
    def picture_size(self) -> tuple[int, int]:
        """Square. Raises UserError for a model without an autoencoder."""
        side = self.config.painting.latent_size * self._autoencoder.config.factor
        return side, side

    @property
    def input_size(self) -> tuple[int, int]:
        """What SigLIP reads."""
        return self.config.vision.image_size, self.config.vision.image_size

    @property
    def pads_input(self) -> bool:
        """The official processor crops nothing."""
        return True

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(self.config.text.num_hidden_layers, batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        return self.language_model.extend_text(ids, lengths, cache)

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]."""
        return self.language_model(ids)

    def prompt_text(self, prompt: str) -> str:
        """The prompt as the user's turn of a chat."""
        return self.config.prompt_format.replace("{prompt}", prompt.strip())

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """BOS and the formatted prompt's tokens: the token that begins the picture gives its place to the time."""
        return [self.config.bos_token_id, *ids]

    def guide(self, prefixes: Sequence[Sequence[int]], negative: Sequence[int] | None = None) -> KVCache:
        """BOS alone, but at the prompt's distance from the picture, as the model was trained: one row a prefix.

        The official code masks the prompt's other tokens and lets positions run on, so the picture begins where it
        begins behind the prompt. A negative prefix is read like any other.
        """
        if negative is not None:
            return super().guide(prefixes, negative)
        bos = np.array([[self.config.bos_token_id]], np.int32)
        cache = self.prefill(bos, np.array([1]))[1].select([0] * len(prefixes))
        cache.positions = np.array([len(prefix) for prefix in prefixes])
        return cache

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], seen after the frozen cache."""
        c = self.config.painting

        def network(state: mx.array, share: mx.array) -> mx.array:
            z = unpatchify(state, c.latent_size, c.latent_size, c.patch_size)
            return -patchify(self.flow(z, 1 - share, cache), c.patch_size)  # to the noise, as TrigFlow

        return flow_velocity(x, angle, network)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read begin, features and end of a picture [B, S, S, 3] in [0, 1]; returns the logits [B, V] after it."""
        vectors = self.picture_vectors((pixels * 2 - 1).astype(self._dtype))
        end = self.language_model.model.embed_tokens(
            mx.full((pixels.shape[0], 1), self.config.eoi_token_id, mx.int32)
        )
        vectors = mx.concatenate([vectors, end], 1)
        hidden = self._read(vectors, np.ones(vectors.shape[:2], bool), cache, store=True)
        return self.language_model.logits(hidden[:, -1])

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> normalised latents (the means of their distributions) in patches."""
        coder = self._autoencoder
        return patchify(coder.normalize(coder.encode(pixels * 2 - 1).mean), self.config.painting.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Normalised latents [B, N, P] -> pixels [B, H, W, 3], clipped to [0, 1]."""
        c, coder = self.config.painting, self._autoencoder
        z = unpatchify(patches, c.latent_size, c.latent_size, c.patch_size)
        return mx.clip((coder.decode(coder.denormalize(z)) + 1) / 2, 0, 1)

    def describe_prompt(self) -> tuple[list[int], list[int]]:
        """The config's own question."""
        return self.question_prompt(self.config.question)

    def question_prompt(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """System message and user's turn; the question and the assistant's turn."""
        c = self.config
        return list(c.picture_before), [*c.question_before, *question, *c.question_after]

    def _read(self, x: mx.array, new: np.ndarray, cache: KVCache, store: bool) -> mx.array:
        """Final hidden states [B, T, D] of vectors [B, T, D] behind the cache; `new` says which are real."""
        decoder, mask = self.language_model.model, cache.text_mask(new)
        hidden, added = decoder.run(x, mask, cache.offset(), cache.layers)
        if store:
            cache.append(added, new)
        return hidden

    @property
    def _autoencoder(self) -> AutoencoderKL:
        if "autoencoder" not in self:
            raise UserError(
                "this JanusFlow was converted without an autoencoder and cannot paint: convert it again with "
                "--autoencoder DIR, the folder of stabilityai/sdxl-vae"
            )
        return self.autoencoder

    @property
    def _dtype(self) -> mx.Dtype:
        return self.vision_gen_dec_aligner_norm.weight.dtype


FAMILY = Family(JanusFlowConfig, JanusFlow)
