"""Models of transfusion-pytorch (lucidrains, versions 0.19 and 0.20): text and rectified flow in one transformer.

A picture is h * w latents, one a token, behind the shape written in characters. Text and pictures pass the same
layers, each in its own way (lucidrains_layers.py); a picture's tokens see each other and share one rotary position.
Between the layers run the skips of a U-Net (the first half hands its inputs to the second), and behind each layer a
learned mixture of all outputs so far. Both belong to a token, so a cache of keys and values is all that stays behind.

Time runs from 0 (noise) to 1 (data), and the network predicts data - noise, or the data (`clean_output`).
Shapes: B rows, T positions, D width, N tokens of C latent numbers, channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.flow_time import flow_velocity
from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig
from mlx_transfusion.models.lucidrains_layers import Layer, Modality, TimeEmbedding, UnitNorm
from mlx_transfusion.models.patches import patchify, unpatchify


class Lucidrains(PictureFamily):
    """Reads and writes text, and makes latents of one or more kinds."""

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.time = TimeEmbedding(config.dim)
        self.rotary_frequencies = 10000.0 ** (-mx.arange(0, config.dim_head, 2) / config.dim_head)
        self.layers = [Layer(config, i) for i in range(config.depth)]
        self.norm = UnitNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.modalities = [Modality(config, i) for i in range(len(config.modalities))]
        if config.autoencoder is not None:
            self.autoencoder = AutoencoderKL(config.autoencoder)

    @property
    def config(self) -> LucidrainsConfig:
        """The configuration the model was built from."""
        return self._config

    # ---- the network itself -------------------------------------------------------------------------------------

    def read_text(
        self, ids: np.ndarray | mx.array, new: np.ndarray, cache: KVCache, store: bool = True
    ) -> mx.array:
        """Final hidden states [B, T, D] of tokens [B, T] behind the cache; `new` [B, T] says which are real."""
        t = ids.shape[1]
        positions = cache.positions[:, None] + np.arange(t)
        x = self.embed_tokens(mx.array(ids))
        hidden, added = self._run(x, None, _mask(cache, new, causal=True), positions, cache.layers)
        if store:
            cache.append(added, new)
        return hidden

    def flow(
        self,
        x: mx.array,
        times: mx.array,
        cache: KVCache,
        kind: int = 0,
        shape: tuple[int, ...] | None = None,
        store: bool = False,
    ) -> mx.array:
        """The network's flow, data - noise, [B, N, C] of noisy latents [B, N, C] at times [B] behind the cache.

        shape: tokens along each axis; None is the config's. With `clean_output` the package subtracts and divides in
        the model's width, before the projection to latents; so does this. store: put their keys and values, at one
        position, into the cache (at time 1, of a finished picture).
        """
        modality = self.modalities[kind]
        entered = self._enter(x, kind)
        tokens = self._with_positions(entered, kind, shape)
        new = np.ones(tokens.shape[:2], bool)
        positions = np.broadcast_to(cache.positions[:, None], new.shape)
        hidden, added = self._run(
            tokens, self.time(times), _mask(cache, new, causal=False), positions, cache.layers
        )
        if store:
            cache.append(added, new, np.ones(len(new), int))
        if self.config.clean_output:
            hidden = self._flow_of_data(hidden, entered, times)
        return modality.leave(hidden)

    def flow_alone(
        self, x: mx.array, times: mx.array, kind: int = 0, shape: tuple[int, ...] | None = None
    ) -> mx.array:
        """As `flow` for latents without any text, as the package trains them: no positions but the axial ones.

        With `clean_output` the output is read as data in the latents themselves.
        """
        tokens = self._with_positions(self._enter(x, kind), kind, shape)
        hidden, _ = self._run(tokens, self.time(times), None, None, [None] * len(self.layers))
        out = self.modalities[kind].leave(hidden)
        return self._flow_of_data(out, x, times) if self.config.clean_output else out

    def _enter(self, x: mx.array, kind: int) -> mx.array:
        modality, x = self.modalities[kind], x.astype(self.norm.gamma.dtype)
        return modality.enter(x) if "enter" in modality else x

    def _with_positions(self, tokens: mx.array, kind: int, shape: tuple[int, ...] | None) -> mx.array:
        modality = self.modalities[kind]
        if "positions" not in modality:
            return tokens
        return tokens + modality.positions(shape or self.config.modalities[kind].shape or ())

    def _flow_of_data(self, data: mx.array, noisy: mx.array, times: mx.array) -> mx.array:
        return (data - noisy) / mx.maximum(1 - times, self.config.clean_eps)[:, None, None]

    def _run(
        self,
        x: mx.array,
        time: mx.array | None,
        mask: mx.array | None,
        positions: np.ndarray | None,
        past: Sequence[KeysValues | None],
    ) -> tuple[mx.array, list[KeysValues]]:
        """All layers on vectors [B, T, D]: final hidden states, and new keys and values."""
        rotary = None
        if positions is not None:
            rotary = mx.array(positions.astype(np.float32))[:, None, :, None] * self.rotary_frequencies
        states, skips, added = [x], [], []
        first_values = None
        for i, (layer, before) in enumerate(zip(self.layers, past, strict=True)):
            if i < len(self.layers) // 2:
                skips.append(x)
            if "skip" in layer:
                x = layer.skip(mx.concatenate([x, skips.pop()], -1)) + x
            attention, feed_forward = layer.attention, layer.feed_forward
            out, new, values = attention.layer(attention.enter(x, time), mask, rotary, before, first_values)
            if self.config.value_residual and first_values is None:
                first_values = values
            added.append(new)
            x = x + attention.leave(out, time)
            x = x + feed_forward.leave(feed_forward.layer(feed_forward.enter(x, time)), time)
            states.append(x)
            x = layer.mixture(states)
        return self.norm(x), added

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens of a picture, latent numbers in each)."""
        return prod(self.config.picture_shape), self.config.modalities[self.config.painted].dim_latent

    @property
    def picture_channels(self) -> int:
        """Of the pixels, where latents are pixels or come from an autoencoder; else of the latent."""
        coder = self.config.autoencoder
        return coder.out_channels if coder else self.latent_shape[1] // self.config.patch_size**2

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width)."""
        (h, w), coder = self.config.picture_shape, self.config.autoencoder
        scale = self.config.patch_size * (coder.factor if coder else 1)
        return h * scale, w * scale

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(len(self.layers), batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        hidden = self.read_text(ids, np.arange(ids.shape[1]) < lengths[:, None], cache)
        return self.lm_head(hidden[mx.arange(len(ids)), mx.array(lengths - 1)])

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]."""
        return self.lm_head(
            self.read_text(ids, np.ones(ids.shape, bool), self.new_cache(len(ids)), store=False)
        )

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """BOS, the prompt's tokens, and the picture's shape."""
        c = self.config
        return [c.sos_id, *ids, *c.opening(c.painted, c.picture_shape)]

    def guide(self, prefixes: Sequence[Sequence[int]], negative: Sequence[int] | None = None) -> KVCache:
        """As many null tokens as the prompt has tokens, marks and all, as the package has it: one row a prefix.

        A negative prefix is read like any other.
        """
        if negative is not None:
            return super().guide(prefixes, negative)
        lengths = np.array([len(prefix) or len(self.image_prefix([])) for prefix in prefixes])
        ids = np.full((len(prefixes), int(lengths.max())), self.config.null_id, np.int32)
        return self.prefill(ids, lengths)[1]

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, C] of noisy latents [B, N, C] at angles [B], seen after the frozen cache."""
        # The network's flow runs to the data, TrigFlow to the noise.
        return flow_velocity(x, angle, lambda state, s: -self.flow(state, 1 - s, cache, self.config.painted))

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the finished picture [B, N, C] at time 1, as the package reads pictures of the past."""
        self.flow(x0, mx.ones(len(x0)), cache, self.config.painted, store=True)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read a picture's shape, the picture [B, H, W, C] in [0, 1] and its end; returns logits [B, V] after it."""
        c, batch = self.config, len(pixels)
        before = np.array([c.opening(c.painted, c.picture_shape)] * batch)
        self.extend_text(before, np.full(batch, before.shape[1]), cache)
        self.extend_image(self.encode(pixels), cache)
        return self.extend_text(np.full((batch, 1), c.eom_id(c.painted)), np.ones(batch, int), cache)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> latents [B, N, C]: pixels in [-1, 1], or the autoencoder's means."""
        x = pixels * 2 - 1
        if "autoencoder" in self:
            x = self.autoencoder.normalize(self.autoencoder.encode(x).mean)
        return patchify(x, self.config.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Latents [B, N, C] -> pixels [B, H, W, 3], clipped to [0, 1]."""
        (h, w), p = self.config.picture_shape, self.config.patch_size
        x = unpatchify(patches, h * p, w * p, p)
        if "autoencoder" in self:
            x = self.autoencoder.decode(self.autoencoder.denormalize(x))
        return mx.clip((x + 1) / 2, 0, 1)


def _mask(cache: KVCache, new: np.ndarray, causal: bool) -> mx.array | None:
    """Which columns of cache and new tokens [B, T] each new one sees, bool [B, 1, T, S + T]; None: all of them."""
    t, s = new.shape[1], cache.valid.shape[1]
    visible = np.repeat(cache.visible(new)[:, None], t, 1)
    if causal:
        visible &= np.tril(np.ones((t, s + t), bool), s)
    visible |= np.eye(t, s + t, s, dtype=bool)  # a padded query keeps itself: softmax of nothing is undefined
    return None if visible.all() else mx.array(visible[:, None])


FAMILY = Family(LucidrainsConfig, Lucidrains)
