"""MonoFormer (arXiv 2409.16280): Transfusion's idea with a DDPM: one Llama that writes text and predicts noise.

A picture being painted is one token that is the time, then its latent in patches, in raster order: text and the time
are causal, the patches see each other. The patches' vectors get fixed 2-D sines once, before the first layer, and
rotary positions in every layer, as text. A last layer that the time steers turns their hidden states into the noise
and, for DDPM's own sampler (ddpm.py), into values of the variance. A picture to read, where the checkpoint has
CLIP, is CLIP's features behind a time token of step 0, causal and without those sines.

The network knows the step t of a linear DDPM schedule and predicts eps; `velocity` is made of both (ddpm.py tells how
an angle becomes a step). Latents are those of Stable Diffusion's autoencoder times 0.18215, of about unit deviation.
Official weights take a patch as (channel, row, column) and give it as (row, column, channel); here both are the
latter, as everywhere in this package, and the converter turns the columns of `x_embedder`.
Shapes: B rows, T positions, D width, N patches of P = p*p*C numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.models import ddpm
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.clip_vision import ClipVision
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.layers import Block
from mlx_transfusion.models.monoformer_config import MonoFormerConfig
from mlx_transfusion.models.monoformer_parts import (
    FinalLayer,
    TimeEmbedder,
    TwoLayers,
    picture_mask,
    position_sines,
)
from mlx_transfusion.models.patches import patchify, unpatchify

FIRST_CHANNELS = 3
"""Official guidance moves these channels of the latent and leaves the others as the prompt alone gives them."""
NO_VISION = "this MonoFormer has no vision encoder and cannot read pictures: it only paints them"


class MonoFormer(PictureFamily):
    """Reads and writes text, paints pictures by predicting noise, and may read pictures through CLIP."""

    def __init__(self, config: MonoFormerConfig) -> None:
        super().__init__()
        self._config = config
        d = config.hidden_size
        self._table = ddpm.AngleTable(ddpm.linear_alpha_bar())
        self._sines = position_sines(config.grid, d)
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.t_embedder = TimeEmbedder(d)
        self.t_projector = TwoLayers(d, d)
        self.x_embedder = nn.Linear(config.patch_dim, d)
        self.final_layer = FinalLayer(d, 2 * config.patch_dim)
        if config.vision is not None:
            self.vision = ClipVision(config.vision)
            self.im_embedder = TwoLayers(config.vision.hidden_size, d)
        if config.autoencoder is not None:
            self.autoencoder = AutoencoderKL(config.autoencoder)

    @property
    def config(self) -> MonoFormerConfig:
        """The configuration the model was built from."""
        return self._config

    # ---- the network itself -----------------------------------------------------------------------------------

    def predict(self, x: mx.array, step: mx.array, cache: KVCache) -> tuple[mx.array, mx.array]:
        """Noise and variance values, each [B, N, P], of x [B, N, P] at time steps [B] (0..999) behind the cache."""
        time = self.t_embedder(step)
        tokens = mx.concatenate([self._time_token(time), self._noisy_tokens(x)], 1)
        hidden = self._read(tokens, np.ones(tokens.shape[:2], bool), cache, store=False, picture=1)
        return self.noise_and_variance(hidden[:, 1:], time)

    def noise_and_variance(self, hidden: mx.array, time: mx.array) -> tuple[mx.array, mx.array]:
        """Hidden states [B, N, D] of the patches and the time [B, D] -> each [B, N, P]."""
        c = self.config
        out = self.final_layer(hidden, time)
        out = out.reshape(*out.shape[:2], c.patch_size**2, 2 * c.latent_channels)
        return tuple(part.reshape(*hidden.shape[:2], -1) for part in mx.split(out, 2, -1))  # type: ignore[return-value]

    def guided(
        self,
        conditional: mx.array,
        unconditional: mx.array,
        scale: float,
        x: mx.array | None = None,
        angle: float | None = None,
    ) -> mx.array:
        """Classifier-free guidance as the official code has it, of noise or velocities [B, N, P]."""
        c = self.config
        shape = (*conditional.shape[:2], c.patch_size**2, c.latent_channels)
        led = (mx.arange(c.latent_channels) < FIRST_CHANNELS).astype(conditional.dtype)
        push = (conditional - unconditional).reshape(shape) * (led * (scale - 1))
        return conditional + push.reshape(conditional.shape)

    def sample_ddpm(
        self,
        x: mx.array,
        cache: KVCache,
        guide: KVCache | None,
        scale: float,
        chain: ddpm.Chain,
        noise: Callable[[int], mx.array],
        callback: Callable[[int, mx.array, mx.array], None] | None = None,
    ) -> mx.array:
        """The official sampler, DDPM with the learned variance: x [B, N, P] at the chain's last step -> data.

        guide: as many rows as the cache, or None for no guidance. noise, callback: as `ddpm.sample`.
        """
        both = cache if guide is None else cache.stack(guide)

        def predict(x: mx.array, step: mx.array) -> tuple[mx.array, mx.array]:
            if guide is None:
                return self.predict(x, step, both)
            b = len(x)
            eps, variance = self.predict(mx.concatenate([x, x]), mx.concatenate([step, step]), both)
            return self.guided(eps[:b], eps[b:], scale), variance[:b]

        return ddpm.sample(predict, x, chain, noise, callback)

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def predicts_noise(self) -> bool:
        """It predicts eps."""
        return True

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, latent numbers in a patch)."""
        return self.config.grid**2, self.config.patch_dim

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width). Raises UserError for a model without an autoencoder."""
        side = self.config.latent_size * self._autoencoder.config.factor
        return side, side

    @property
    def input_size(self) -> tuple[int, int]:
        """What CLIP reads. Raises UserError for a checkpoint without CLIP."""
        if self.config.vision is None:
            raise UserError(NO_VISION)
        return self.config.vision.image_size, self.config.vision.image_size

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(len(self.layers), batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        new = np.arange(ids.shape[1]) < lengths[:, None]
        hidden = self._read(self.embed_tokens(mx.array(ids)), new, cache, store=True)
        return self.lm_head(hidden[mx.arange(len(ids)), mx.array(lengths - 1)])

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]."""
        cache, new = self.new_cache(len(ids)), np.ones(ids.shape, bool)
        return self.lm_head(self._read(self.embed_tokens(ids), new, cache, store=False))

    def prompt_text(self, prompt: str) -> str:
        """The sentence of training around what the picture shows, usually an ImageNet label."""
        return self.config.prompt_format.replace("{prompt}", prompt)

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], seen after the frozen cache."""
        eps, _ = self.predict(x, self._table.index(angle), cache)
        return trigflow.velocity_from_eps(x, eps, angle[:, None, None])

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the finished picture [B, N, P] at step 0, the cleanest that the network knows.

        Official training has no text behind such a picture, so what is written there was never learned.
        """
        time = self.t_embedder(mx.zeros(len(x0)))
        tokens = mx.concatenate([self._time_token(time), self._noisy_tokens(x0)], 1)
        self._read(tokens, np.ones(tokens.shape[:2], bool), cache, store=True, picture=1)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read BOI, a picture [B, S, S, 3] in [0, 1] through CLIP, and EOI; returns the logits [B, V] after it.

        Raises UserError for a checkpoint without CLIP, as the public one.
        """
        vectors = self.picture_vectors(pixels)
        begin, end = (
            mx.broadcast_to(self.embed_tokens(mx.array([token])), (len(pixels), 1, vectors.shape[-1]))
            for token in (self.config.boi_token_id, self.config.eoi_token_id)
        )
        tokens = mx.concatenate([begin, vectors, end], 1)
        hidden = self._read(tokens, np.ones(tokens.shape[:2], bool), cache, store=True)
        return self.lm_head(hidden[:, -1])

    def picture_vectors(self, pixels: mx.array) -> mx.array:
        """What is read of pictures [B, S, S, 3] in [0, 1]: the time of step 0, then CLIP's patches [B, 1 + N, D].

        Raises UserError for a checkpoint without CLIP.
        """
        if "vision" not in self:
            raise UserError(NO_VISION)
        time = self._time_token(self.t_embedder(mx.zeros(len(pixels))))
        return mx.concatenate([time, self.im_embedder(self.vision(pixels))], 1)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> normalised latents (the means of their distributions) in patches."""
        coder = self._autoencoder
        return patchify(coder.normalize(coder.encode(pixels * 2 - 1).mean), self.config.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Normalised latents [B, N, P] -> pixels [B, H, W, 3], clipped to [0, 1]."""
        c, coder = self.config, self._autoencoder
        z = unpatchify(patches, c.latent_size, c.latent_size, c.patch_size)
        return mx.clip((coder.decode(coder.denormalize(z)) + 1) / 2, 0, 1)

    # ---- parts --------------------------------------------------------------------------------------------------

    def _time_token(self, time: mx.array) -> mx.array:
        return self.t_projector(time)[:, None]

    def _noisy_tokens(self, x: mx.array) -> mx.array:
        tokens = self.x_embedder(x.astype(self._dtype))
        return tokens + self._sines.astype(self._dtype) if self.config.position_sines else tokens

    def _read(
        self, x: mx.array, new: np.ndarray, cache: KVCache, store: bool, picture: int | None = None
    ) -> mx.array:
        """Final hidden states [B, T, D] of vectors [B, T, D] behind the cache; `new` says which are real.

        picture: from this one on they are patches of one picture.
        """
        bidirectional = picture is not None and self.config.picture_attention
        mask = picture_mask(cache, new, picture or 0) if bidirectional else cache.text_mask(new)
        added = []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x, pair = layer(x, mask, cache.offset(), past)
            added.append(pair)
        if store:
            cache.append(added, new)
        return self.norm(x)

    @property
    def _autoencoder(self) -> AutoencoderKL:
        if "autoencoder" not in self:
            raise UserError(
                "this MonoFormer was converted without an autoencoder and cannot paint: convert it again with "
                "--autoencoder DIR, the folder of stabilityai/sd-vae-ft-mse"
            )
        return self.autoencoder

    @property
    def _dtype(self) -> mx.Dtype:
        return self.norm.weight.dtype


FAMILY = Family(MonoFormerConfig, MonoFormer)
