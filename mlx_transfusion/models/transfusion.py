"""The Transfusion model (arXiv 2408.11039): one transformer that predicts tokens and denoises image patches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_transfusion import trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.lanes import by_rows, split
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.layers import Block, KeysValues, Mask
from mlx_transfusion.models.painter import Painter
from mlx_transfusion.models.patches import (
    AngleEmbedding,
    PatchDecoder,
    PatchEncoder,
    patchify,
    unpatchify,
)
from mlx_transfusion.models.unet import Skips
from mlx_transfusion.picture_sizes import Size, best, named


class TrainArrays(NamedTuple):
    """What one training forward reads: packed rows of `sequence.PackedBatch` as mlx arrays."""

    ids: mx.array  # int32 [B, T]
    is_image: mx.array  # bool [B, T, 1]
    patch_row: mx.array  # int32 [B, T]
    patch_index: mx.array  # int32 [M*N]
    text_index: mx.array  # int32 [K]
    mask: mx.array  # bool [B, 1, T, T]
    patches: mx.array  # float32 [M, N, P], already noised
    angle: mx.array  # float32 [M]
    more: tuple[tuple[mx.array, mx.array], ...] = ()
    """Patches and angles of each further size of `config.sizes`; patch_row and patch_index count through all."""

    @property
    def groups(self) -> tuple[tuple[mx.array, mx.array], ...]:
        """Patches [M, N, P] and angles [M] of each size."""
        return (self.patches, self.angle), *self.more


class Part(Protocol):
    """What a picture passes: the model itself, or its painter."""

    angle_embedding: AngleEmbedding
    patch_encoder: PatchEncoder
    layers: list[Block]
    norm: nn.RMSNorm
    patch_decoder: PatchDecoder


@dataclass(frozen=True)
class Coder:
    """The autoencoder whose latents a model paints, and the folder that it was read from."""

    model: AutoencoderKL
    path: Path
    preview: Callable[[np.ndarray], np.ndarray] | None = None
    """Normalised latents [B, h, w, C] -> pixels uint8 [B, h, w, 3], without the decoder."""


class Transfusion(PictureFamily):
    """Text embedding and head, patch encoder and decoder (linear or U-Net), and one transformer in between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self._gradient_checkpointing = False
        self.coder: Coder | None = None
        """What turns latents into pictures; no part of the weights. None: it paints pixels, or bare latents."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.weight = mx.random.normal(self.embed_tokens.weight.shape)
        # Of a painter's model it is the painter alone that paints, so only it is told the scale.
        self.angle_embedding = AngleEmbedding(config, config.guidance_condition and not config.painter)
        self.patch_encoder = PatchEncoder(config)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_decoder = PatchDecoder(config)
        if config.painter:
            self.painter = Painter(config)

    @property
    def config(self) -> ModelConfig:
        """The configuration the model was built from."""
        return self._config

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each block in the backward pass instead of keeping its activations (off by default)."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self._gradient_checkpointing = on

    # ---- training -------------------------------------------------------------------------------------------

    def __call__(self, batch: TrainArrays) -> tuple[mx.array, mx.array]:
        """As `predict`, with the predictions of the first size alone [M, N, P]: all there are of most models."""
        logits, predictions = self.predict(batch)
        return logits, predictions[0]

    def predict(self, batch: TrainArrays) -> tuple[mx.array, list[mx.array]]:
        """One pass over packed sequences.

        Returns the logits of the K text-loss positions [K, V] and, for each size, the prediction for every patch
        [M, N, P] (noise or velocity, by `config.prediction`). RoPE is relative, so positions may run on through a row
        of several documents: only differences inside a document are ever seen.
        """
        x = self.embed_tokens(batch.ids)
        out = [patches for patches, _ in batch.groups]
        present = [
            i for i, patches in enumerate(out) if len(patches)
        ]  # an empty array has no place to look up
        angles = {i: self.angle_embedding(batch.groups[i][1]) for i in present}
        read = {
            i: _patch_tokens(self, out[i], angles[i], self.config.grid(self.config.sizes[i])) for i in present
        }
        if present:
            tokens = [read[i][0].reshape(-1, x.shape[-1]) for i in present]
            stacked = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)
            x = mx.where(batch.is_image, stacked[batch.patch_row], x)
        hidden, _ = self._run(self, x, batch.mask, 0, [None] * len(self.layers))
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = mx.concatenate(by_rows(self.lm_head, x[batch.text_index]))
        start = 0
        for i in present:
            m, n, _ = out[i].shape
            places = batch.patch_index[start : start + m * n]
            out[i] = self.patch_decoder(x[places].reshape(m, n, -1), out[i], angles[i], read[i][1])
            start += m * n
        return logits, out

    # ---- distillation: the same passes on plain arrays, differentiable and of fixed shape ------------------------

    def read_prefix(
        self, ids: mx.array, clean: mx.array | None = None, start: mx.array | None = None
    ) -> tuple[mx.array, list[KeysValues]]:
        """Read prompts [M, S] that are padded on the right.

        clean: patches [M, N, P] of a finished picture in each prompt, from column start [M] on, whatever the ids
        say there; a prompt with a negative start has none.

        Returns the final hidden states [M, S, D] and each layer's keys and values. Padding comes last and is
        invisible to what stands before it; `paint` must be told not to look at it.
        """
        x = self.embed_tokens(ids)
        mask: Mask = "causal"
        if clean is not None and start is not None:
            x, mask = self._with_pictures(x, clean, start)
        return self._run(self, x, mask, 0, [None] * len(self.layers))

    def _with_pictures(self, x: mx.array, clean: mx.array, start: mx.array) -> tuple[mx.array, mx.array]:
        """Token vectors [M, S, D] with those of clean pictures in their places, and who sees whom [M, 1, S, S]."""
        embedded = self.angle_embedding(mx.zeros((len(clean),)))
        tokens, _ = _patch_tokens(self, clean, embedded, self.config.grid())
        patch = mx.arange(x.shape[1]) - start[:, None]
        inside = (patch >= 0) & (patch < tokens.shape[1]) & (start >= 0)[:, None]
        place = mx.clip(patch, 0, tokens.shape[1] - 1)[..., None]
        x = mx.where(inside[..., None], mx.take_along_axis(tokens, place, 1), x)
        mask = mx.tril(mx.ones((x.shape[1], x.shape[1]), mx.bool_))[None, None]
        if self.config.bidirectional:
            mask = mask | (inside[:, None, :, None] & inside[:, None, None])
        return x, mask

    def paint(
        self,
        x: mx.array,
        angle: mx.array,
        prefix: list[KeysValues],
        lengths: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """The network's prediction [M, N, P] for noisy patches [M, N, P] at angles [M], behind a read prefix.

        lengths int [M] counts the prefix's real tokens. The prefix cannot see the picture, so it does not depend
        on `x` and `angle`: it may be shared by a value, its derivative along the trajectory, and its gradient.
        guidance: the scales [M] of a model with `guidance_condition`.
        """
        part = self._painting
        embedded = part.angle_embedding(angle, guidance)
        n, columns = x.shape[1], prefix[0][0].shape[2]
        seen = mx.arange(columns) < lengths[:, None]
        own = mx.ones((n, n), mx.bool_) if self.config.bidirectional else mx.tril(mx.ones((n, n), mx.bool_))
        shape = x.shape[0], n
        mask = mx.concatenate(
            [mx.broadcast_to(seen[:, None], (*shape, columns)), mx.broadcast_to(own, (*shape, n))], -1
        )[:, None]
        tokens, skips = _patch_tokens(part, x, embedded, self.config.grid())
        hidden, _ = self._run(part, tokens, mask, lengths, prefix)
        return part.patch_decoder(hidden, x, embedded, skips)

    def cos_velocity(
        self, x: mx.array, angle: mx.array, prefix: list[KeysValues], lengths: mx.array
    ) -> mx.array:
        """cos(angle) times the TrigFlow velocity [M, N, P], as `paint`: exact for either prediction."""
        out, per_patch = self.paint(x, angle, prefix, lengths), angle[:, None, None]
        if self.config.prediction == "velocity":
            return mx.cos(per_patch) * out
        return trigflow.cos_velocity_from_eps(x, out, per_patch)

    # ---- generation: the interface of every family (family.py) --------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, numbers in a patch)."""
        return self.config.patches_per_image, self.config.patch_dim

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.sizes[0]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) in pixels of all pictures that it learnt, its own size first."""
        return tuple((h * self._factor, w * self._factor) for h, w in self.config.sizes)

    @property
    def _factor(self) -> int:
        """Pixels a side of one element: 1, unless these are an autoencoder's latents."""
        return 1 if self.coder is None else self.coder.model.config.factor

    def at_size(self, height: int, width: int) -> Transfusion:
        """The same model, on the same weights, that paints (height, width) in pixels, whether it learnt that or not.

        Raises UserError for a size that patches do not divide, one that does not fit the longest sequence, and, of a
        model of one size, any other.
        """
        if (height, width) == self.picture_size:
            return self
        c, side = self.config, self._factor * self.config.patch_size
        if c.patch_positions != "coordinates":
            super().at_size(height, width)
        if min(height, width) < 1 or height % side or width % side:
            raise UserError(
                f"{width}x{height} cannot be cut into patches of {side} pixels: this model learnt "
                f"{named(self.sizes)}; any other width and height must be multiples of {side}"
            )
        view = self.resized((height // self._factor, width // self._factor))
        if view.config.patches_per_image + 2 > c.max_position:
            raise UserError(
                f"{width}x{height} is {view.config.patches_per_image} patches, and this model's longest sequence is "
                f"{c.max_position}: choose a smaller size"
            )
        return view

    def resized(self, size: Size) -> Transfusion:
        """The same model, on the same weights, for pictures of (height, width) in elements."""
        if size == self.config.sizes[0]:
            return self
        view = copy.copy(self)
        view._config = self.config.at_size(*size)
        return view

    def reading_size(self, height: int, width: int) -> Size:
        """The learnt size that is nearest in aspect to a user's picture, and that it fills, if any."""
        return best(height, width, self.sizes)

    @property
    def picture_channels(self) -> int:
        """3 of pixels, another number of latents without an autoencoder."""
        return self.config.image_channels if self.coder is None else 3

    @property
    def uses_lanes(self) -> bool:
        """It does."""
        return True

    @property
    def predicts_noise(self) -> bool:
        """Whether the network was trained to predict eps, as the paper's."""
        return self.config.prediction == "epsilon"

    @property
    def guidance_condition(self) -> bool:
        """Whether the guidance scale is an input."""
        return self.config.guidance_condition

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(len(self.layers), batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read further text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        t = ids.shape[1]
        new = np.arange(t) < lengths[:, None]
        hidden = self._decode_tokens(
            self, self.embed_tokens(mx.array(ids)), cache.text_mask(new), cache, store=new
        )
        last = hidden[mx.arange(len(ids)), mx.array(lengths - 1)]
        return self.lm_head(last)

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity of noisy patches [B, N, P] at angles [B] (radians), seen after the frozen cache.

        guidance: the scales [B] of a model with `guidance_condition`, which gives the guided one in this pass.
        """
        part = self._painting
        embedded = part.angle_embedding(angle, guidance)
        tokens, skips = _patch_tokens(part, x, embedded, self.config.grid())
        hidden = self._decode_image(part, tokens, cache, store=False)
        out = part.patch_decoder(hidden, x, embedded, skips)
        if self.config.prediction == "velocity":
            return out
        return trigflow.velocity_from_eps(x, out, angle[:, None, None])

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read CLEAN patches [B, N, P] (angle 0) into `cache`, so that what follows sees the finished picture."""
        embedded = self.angle_embedding(mx.zeros((x0.shape[0],)))
        tokens, _ = _patch_tokens(self, x0, embedded, self.config.grid())
        self._decode_image(self, tokens, cache, store=True)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read BOI, a clean picture [B, H, W, C] in [0, 1] and EOI; returns the logits [B, V] after it."""
        batch, height, width, _ = pixels.shape

        def read(token: int) -> mx.array:
            return self.extend_text(np.full((batch, 1), token, np.int32), np.ones(batch, int), cache)

        read(self.config.boi_token_id)
        self.at_size(height, width).extend_image(self.encode(pixels), cache)
        return read(self.config.eoi_token_id)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, C] in [0, 1] -> patches [B, N, P] with unit standard deviation."""
        signed = pixels * 2 - 1
        if self.coder is None:
            return self.latent_patches(signed)
        coder = self.coder.model
        return self.latent_patches(coder.normalize(coder.encode(signed).mean))

    def latent_patches(self, x: mx.array) -> mx.array:
        """Latents, or pixels in [-1, 1], [B, H, W, C] -> patches [B, N, P] with unit standard deviation."""
        x = (x - mx.array(self.config.image_mean)) / self.config.image_std
        return patchify(x, self.config.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Patches [B, N, P] -> pixels [B, H, W, C], clipped to [0, 1]."""
        x = self._latents(patches)
        if self.coder is not None:
            x = self.coder.model.decode(self.coder.model.denormalize(x))
        return mx.clip((x + 1) / 2, 0, 1)

    def preview(self, patches: mx.array) -> mx.array:
        """As `decode`; of latents by the linear map of their autoencoder, one colour for each element."""
        if self.coder is None or self.coder.preview is None:
            return self.decode(patches)
        small = mx.array(self.coder.preview(np.array(self._latents(patches)))).astype(mx.float32) / 255
        factor = self.coder.model.factor
        return mx.repeat(mx.repeat(small, factor, 1), factor, 2)

    def _latents(self, patches: mx.array) -> mx.array:
        """Patches [B, N, P] -> latents, or pixels in [-1, 1], [B, H, W, C]: the way back of `latent_patches`."""
        c = self.config
        x = unpatchify(patches, c.image_height, c.image_width, c.patch_size)
        return x * c.image_std + mx.array(c.image_mean)

    @property
    def _painting(self) -> Part:
        """The weights that a noisy picture passes behind its prefix."""
        return self.painter if "painter" in self else self

    def _decode_image(self, part: Part, tokens: mx.array, cache: KVCache, store: bool) -> mx.array:
        """Hidden states of one picture's token vectors [B, N, D] behind the cache, and into it if `store`."""
        new = np.ones(tokens.shape[:2], bool)
        mask = cache.picture_mask(new) if self.config.bidirectional else cache.text_mask(new)
        return self._decode_tokens(part, tokens, mask, cache, new if store else None)

    def _decode_tokens(
        self, part: Part, x: mx.array, mask: Mask, cache: KVCache, store: np.ndarray | None
    ) -> mx.array:
        """Run the decoder on new token vectors [B, T, D]; `store` (which of them are real) puts them in the cache."""
        hidden, added = self._run(part, x, mask, cache.offset(), cache.layers)
        if store is not None:
            cache.append(added, store)
        return hidden

    def _run(
        self, part: Part, x: mx.array, mask: Mask, offset: int | mx.array, past: Sequence[KeysValues | None]
    ) -> tuple[mx.array, list[KeysValues]]:
        """The decoder on token vectors [B, T, D] behind `past`: final hidden states, and new keys and values.

        In open lanes (lanes.py) the rows are shared out between the cores.
        """
        lanes = split(*x.shape[:2])
        if not lanes:
            return self._run_rows(part, x, mask, offset, past)
        done = []
        for stream, rows in lanes:
            with mx.stream(stream):
                of_rows = [None if p is None else (p[0][rows], p[1][rows]) for p in past]
                done.append(self._run_rows(part, x[rows], _of(rows, mask), _of(rows, offset), of_rows))
        added = [
            (mx.concatenate([k for k, _ in layer]), mx.concatenate([v for _, v in layer]))
            for layer in zip(*(new for _, new in done), strict=True)
        ]
        return mx.concatenate([hidden for hidden, _ in done]), added

    def _run_rows(
        self, part: Part, x: mx.array, mask: Mask, offset: int | mx.array, past: Sequence[KeysValues | None]
    ) -> tuple[mx.array, list[KeysValues]]:
        added = []
        for layer, before in zip(part.layers, past, strict=True):
            run = nn.utils.checkpoint(layer) if self.gradient_checkpointing else layer
            x, new = run(x, mask, offset, before)
            added.append(new)
        return part.norm(x), added


def _of(rows: slice, value: Any) -> Any:
    """The part of a mask [B or 1, ...] or of offsets [B] that belongs to some rows; anything else serves all."""
    return value[rows] if isinstance(value, mx.array) and value.shape[0] > 1 else value


def _patch_tokens(part: Part, patches: mx.array, embedded: mx.array, grid: Size) -> tuple[mx.array, Skips]:
    """Token vectors [B, N, D] of noisy patches in a grid, in the decoder's precision, and the encoder's skips.

    The angle's sines are always float32, and one float32 addend would turn the whole decoder into float32.
    """
    tokens, skips = part.patch_encoder(patches, embedded, grid)
    return tokens.astype(part.norm.weight.dtype), skips


def with_painter(model: Transfusion) -> Transfusion:
    """A model that also has a painter, whose weights begin as copies of its own; the model itself stays as it is."""
    out = Transfusion(replace(model.config, painter=True))
    out.coder = model.coder
    weights = model.parameters()
    own = {name: weights[name] for name in out.painter.parameters()}
    angle = {name: weights["angle_embedding"][name] for name in out.angle_embedding.parameters()}
    # Copies: the same array cannot be trained in one place and be a constant of a compiled step in another.
    out.update({**weights, "angle_embedding": angle, "painter": tree_map(lambda w: w + 0, own)})
    return out


FAMILY = Family(ModelConfig, Transfusion)
