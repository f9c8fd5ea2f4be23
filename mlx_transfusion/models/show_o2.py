"""Show-o2 (arXiv 2506.15564): one language model over text and fused pictures, and a flow head that sees both.

A picture, painted or read, is its latents on two ways that are fused (show_o2_vision.py), behind one token that is
the time: 0 is noise, 1 data. Text is causal; the tokens of a picture see each other, and positions simply go on. The
velocity of a rectified flow comes from a head of transformer blocks that reads the language model's hidden states of
the whole row (show_o2_head.py); writing does not need it.

So the cache holds, beside keys and values, those hidden states, and which picture a token belongs to: the head reads
the row anew at every step, which costs little, because text is short beside a picture. Parameter names are the
official ones in fewer words (convert/show_o2.py).
Shapes: B rows, T positions, D width, N patches of P numbers, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.flow_time import FlowTimeEmbedding, flow_velocity
from mlx_transfusion.models.layers import KeysValues, Mask
from mlx_transfusion.models.llama import LanguageModel
from mlx_transfusion.models.patches import patchify, unpatchify
from mlx_transfusion.models.show_o2_config import ShowO2Config
from mlx_transfusion.models.show_o2_head import FlowHead
from mlx_transfusion.models.show_o2_vision import DualPath
from mlx_transfusion.models.wan_vae import WanVAE

TEXT, NOISY, CLEAN = 0, 1, 2
"""Kinds of tokens, for the head: the second and third are steered by the time of a picture."""


class ShowO2(PictureFamily):
    """Reads and writes text, reads pictures, paints them."""

    def __init__(self, config: ShowO2Config) -> None:
        super().__init__()
        self._config = config
        width, head = config.text.hidden_size, config.head.hidden_size
        self.model = LanguageModel(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.vision = DualPath(config.vision, config.latent_numbers, width, config.position_rows)
        self.time_embed = FlowTimeEmbedding(head)
        if head != width:
            self.time_proj = nn.Linear(head, width)
        self.flow_head = FlowHead(config.head, width, config.latent_numbers)
        self.autoencoder = WanVAE(config.autoencoder)

    @property
    def config(self) -> ShowO2Config:
        """The configuration the model was built from."""
        return self._config

    # ---- plain passes ---------------------------------------------------------------------------------------------

    def logits(self, hidden: mx.array) -> mx.array:
        """Normalised hidden states [..., D] -> logits [..., V]."""
        return self.lm_head(hidden) if "lm_head" in self else self.model.embed_tokens.as_linear(hidden)

    def picture_vectors(self, patches: mx.array, t: mx.array) -> mx.array:
        """What the language model reads of latent patches [B, N, P] at times t [B]: [B, 1 + N, D], the time first."""
        time = self.time_embed(t)
        time = self.time_proj(time) if "time_proj" in self else time
        fused = self.vision(patches.astype(self._dtype), self.config.grid, self.config.resizes_positions)
        return mx.concatenate([time[:, None], fused], 1)

    def unroll(self, out: mx.array) -> mx.array:
        """The head's numbers [B, N, P] of a picture's tokens -> patches [B, N, P].

        Tokens read squares but write strips: laid end to end their numbers are the picture's rows, channels last.
        """
        rows, columns = (side * self.config.patch_size for side in self.config.grid)
        return patchify(out.reshape(out.shape[0], rows, columns, -1), self.config.patch_size)

    def flow(self, x: mx.array, t: mx.array, cache: KVCache) -> mx.array:
        """The network's own velocity, data - noise [B, N, P], of noisy patches [B, N, P] at times t [B].

        It is seen behind the cache, which stays as it is.
        """
        vectors = self.picture_vectors(x, t)
        new = np.ones(vectors.shape[:2], bool)
        hidden, _ = self._run(vectors, cache.picture_mask(new), cache)
        row, kinds, mask, back = _whole_rows(cache, hidden)
        times = mx.stack([self.time_embed(t), self.time_embed(mx.ones_like(t))], 1)
        states = self.flow_head(row, times, kinds, mask)
        painted = mx.take_along_axis(states, back[:, 1:, None], 1)  # without the time's own token
        kind = mx.full(painted.shape[:2], NOISY)
        return self.unroll(self.flow_head.leave(painted, times, kind))

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, latent numbers in a patch)."""
        return self.config.grid_height * self.config.grid_width, self.config.latent_numbers

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width)."""
        stride = self.config.patch_size * self.config.autoencoder.factor
        return self.config.grid_height * stride, self.config.grid_width * stride

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows, with one entry more than layers."""
        return KVCache(self.config.text.num_hidden_layers + 1, batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        new = np.arange(ids.shape[1]) < lengths[:, None]
        hidden, added = self._run(self.model.embed_tokens(mx.array(ids)), cache.text_mask(new), cache)
        _store(cache, hidden, added, np.zeros(ids.shape[1], int), new)
        return self.logits(hidden[mx.arange(len(ids)), mx.array(lengths - 1)])

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]."""
        return self.logits(self.model.run(self.model.embed_tokens(ids))[0])

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], seen after the frozen cache."""
        # The network's flow runs to the data, TrigFlow to the noise.
        return flow_velocity(x, angle, lambda state, s: -self.flow(state, 1 - s, cache))

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the finished picture [B, N, P] that was painted after BOI, at time 1."""
        self._read_painted(x0, mx.ones(x0.shape[0]), cache)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read BOI, time 1, a picture [B, H, W, 3] in [0, 1] and EOI; returns the logits [B, V] after it."""
        return self.read_latents(self.encode(pixels), cache)

    def read_latents(self, x0: mx.array, cache: KVCache) -> mx.array:
        """`read_picture` for normalised latents in patches [B, N, P].

        The mask is the one with which the official program answers questions, and not that of training: the patches
        see EOI, and the time does not see the patches.
        """
        vectors = self.picture_vectors(x0, mx.ones(x0.shape[0]))
        ends = self.model.embed_tokens(mx.array([[self.config.boi_token_id, self.config.eoi_token_id]]))
        ends = mx.broadcast_to(ends, (len(vectors), *ends.shape[1:]))
        vectors = mx.concatenate([ends[:, :1], vectors, ends[:, 1:]], 1)
        b, t = vectors.shape[:2]
        new = np.ones((b, t), bool)
        seen = np.tril(np.ones((t, t), bool))
        seen[2:, 2:] = True
        past = np.broadcast_to(cache.valid[:, None], (b, t, cache.valid.shape[1]))
        mask = mx.array(np.concatenate([past, np.broadcast_to(seen, (b, t, t))], 2)[:, None])
        hidden, added = self._run(vectors, mask, cache)
        picture = np.zeros(t, int)
        picture[1:-1] = 1
        _store(cache, hidden, added, picture, new)
        return self.logits(hidden[:, -1])

    def describe_prompt(self) -> tuple[list[int], list[int]]:
        """The config's own question."""
        return self.question_prompt(self.config.question)

    def question_prompt(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """System message and user's turn; the question and the assistant's turn."""
        return list(self.config.picture_before), [*question, *self.config.question_after]

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> normalised latents (the means of their distributions) in patches."""
        height, width = self.picture_size
        if pixels.shape[1:3] != (height, width):
            raise UserError(
                f"a picture of {pixels.shape[2]}x{pixels.shape[1]} pixels: this model takes {width}x{height}"
            )
        return patchify(self.autoencoder.encode(pixels * 2 - 1)[0], self.config.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Normalised latents [B, N, P] -> pixels [B, H, W, 3] in [0, 1]."""
        height, width = (side // self.config.autoencoder.factor for side in self.picture_size)
        return (self.autoencoder.decode(unpatchify(patches, height, width, self.config.patch_size)) + 1) / 2

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _read_painted(self, x0: mx.array, t: mx.array, cache: KVCache) -> mx.array:
        """Read a picture's patches [B, N, P] at times t [B], as training does; its hidden states [B, 1 + N, D]."""
        vectors = self.picture_vectors(x0, t)
        new = np.ones(vectors.shape[:2], bool)
        hidden, added = self._run(vectors, cache.picture_mask(new), cache)
        _store(cache, hidden, added, np.ones(vectors.shape[1], int), new)
        return hidden

    def _run(self, x: mx.array, mask: Mask, cache: KVCache) -> tuple[mx.array, list[KeysValues]]:
        """Normalised hidden states [B, T, D] of vectors [B, T, D] behind the cache, and new keys and values."""
        return self.model.run(x.astype(self._dtype), mask, cache.offset(), cache.layers[:-1])

    @property
    def _dtype(self) -> mx.Dtype:
        return self.model.norm.weight.dtype


def _store(
    cache: KVCache, hidden: mx.array, added: list[KeysValues], picture: np.ndarray, valid: np.ndarray
) -> None:
    """Put T new tokens into the cache, with hidden states [B, T, D]; picture [T] is 1 for those of one picture."""
    number = 1 + cache.valid.shape[1]  # of the picture, unlike any other's in the row
    pictures = np.broadcast_to(
        (picture * number).astype(np.int32)[None, None, :, None], (len(valid), 1, len(picture), 1)
    )
    cache.append([*added, (hidden[:, None], mx.array(pictures))], valid)


def _whole_rows(cache: KVCache, hidden: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The rows that the head reads: what the cache holds, and a noisy picture of hidden states [B, M, D] behind it.

    Returns hidden states [B, S + M, D], kinds [B, S + M], the mask [B, 1, S + M, S + M] and the places of the picture
    in its row [B, M]. Columns that hold nothing come last, so that places are positions.
    """
    b, m, _ = hidden.shape
    past = cache.layers[-1]
    valid = np.concatenate([cache.valid, np.ones((b, m), bool)], 1)
    total = valid.shape[1]
    pictures = mx.full((b, m), total, mx.int32)
    kinds = mx.full((b, m), NOISY)
    if past is not None:
        hidden = mx.concatenate([past[0][:, 0], hidden], 1)
        before = past[1][:, 0, :, 0]
        kinds = mx.concatenate([mx.where(before > 0, CLEAN, TEXT), kinds], 1)
        pictures = mx.concatenate([before, pictures], 1)
    order = np.argsort(~valid, axis=1, kind="stable")
    if not valid.all():
        index = mx.array(order)
        hidden = mx.take_along_axis(hidden, index[..., None], 1)
        kinds, pictures = (mx.take_along_axis(a, index, 1) for a in (kinds, pictures))
    there = np.take_along_axis(valid, order, 1)
    one_picture = (pictures[:, :, None] == pictures[:, None]) & (pictures > 0)[:, None]
    mask = (mx.tri(total, dtype=mx.bool_) | one_picture) & mx.array(there)[:, None]
    mask = mask | mx.eye(total, dtype=mx.bool_)  # a column that holds nothing sees itself
    back = np.argsort(order, axis=1)[:, -m:]
    return hidden, kinds, mask[:, None], mx.array(back)


FAMILY = Family(ShowO2Config, ShowO2)
