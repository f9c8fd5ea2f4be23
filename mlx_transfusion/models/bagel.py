"""BAGEL (arXiv 2505.14683): one attention over text, semantic features and latents; two experts a layer.

A sequence is a row of blocks. Text is BOS, tokens, EOS, causal, one position each. A picture is begin, tokens, end,
which all see each other and all that came before, and share ONE position: for understanding the features of a
vision transformer, for what shall be edited the clean latents of the FLUX autoencoder (and the features behind
them), and while it is being painted its noisy latents, which never enter the cache.

The latents, scaled and shifted, have about unit standard deviation: they are `velocity`'s data as they are, cut
into patches. Parameter names are the official ones, but for the experts (bagel_layers.py).
Shapes: B rows, T positions, D width, N tokens of a picture of P numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.bagel_guidance import BagelGuidance
from mlx_transfusion.models.bagel_layers import BagelDecoder
from mlx_transfusion.models.bagel_vision import BagelVision, Connector
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.flow_time import FlowTimeEmbedding, flow_velocity
from mlx_transfusion.models.patches import patchify, unpatchify


class Bagel(PictureFamily):
    """Reads and writes text, reads pictures, paints them from text and from other pictures."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self._config = config
        width = config.text.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.decoder = BagelDecoder(config.text)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.vision = BagelVision(config.vision, config.vision_patch_size, config.vision_table_side)
        self.connector = Connector(config.vision.hidden_size, width)
        self.vision_positions = mx.zeros((config.vision_table_side**2, width))
        self.time_embedder = FlowTimeEmbedding(width)
        self.vae2llm = nn.Linear(config.latent_numbers, width)
        self.latent_positions = mx.zeros((config.latent_table_side**2, width))
        self.llm2vae = nn.Linear(width, config.latent_numbers)
        self.autoencoder = AutoencoderKL(config.autoencoder)

    @property
    def config(self) -> BagelConfig:
        """The configuration the model was built from."""
        return self._config

    # ---- plain passes on token vectors --------------------------------------------------------------------------

    def feature_vectors(self, pixels: mx.array) -> mx.array:
        """What the decoder reads of pictures [B, H, W, 3] in [-1, 1] for understanding: [B, N, D]."""
        patch = self.config.vision_patch_size
        rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
        places = _places(rows, columns, self.config.vision_table_side)
        features = self.vision(pixels.astype(self._dtype), places)
        return self.connector(features) + self.vision_positions[places]

    def latent_vectors(self, x: mx.array, t: mx.array, grid: tuple[int, int]) -> mx.array:
        """What the decoder reads of latents [B, N, P] at the flow's times t [B] (0 data, 1 noise): [B, N, D].

        grid: rows and columns of the picture, whose product is N.
        """
        places = _places(*grid, self.config.latent_table_side)
        tokens = self.vae2llm(x.astype(self._dtype)) + self.time_embedder(t)[:, None]
        return tokens + self.latent_positions[places]

    def flow(self, x: mx.array, t: mx.array, cache: KVCache, grid: tuple[int, int] | None = None) -> mx.array:
        """The network's own velocity, noise - data [B, N, P], of noisy latents [B, N, P] at times t [B].

        It is seen behind the cache, which stays as it is. grid: rows and columns; None means the config's.
        """
        tokens = self.latent_vectors(x, t, grid or self.config.grid)
        hidden = self._read_picture_block(tokens, cache, latents=True, store=False)
        return self.llm2vae(hidden[:, 2:])

    def read_latents(self, x0: mx.array, cache: KVCache, grid: tuple[int, int] | None = None) -> None:
        """Read a clean picture's latents [B, N, P] as a block of their own: what editing begins with."""
        tokens = self.latent_vectors(x0, mx.zeros(x0.shape[0]), grid or self.config.grid)
        self._read_picture_block(tokens, cache, latents=True, store=True)

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, latent numbers in a patch)."""
        rows, columns = self.config.grid
        return rows * columns, self.config.latent_numbers

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.config.image_height, self.config.image_width

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that the vision transformer reads."""
        return self.config.input_height, self.config.input_width

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows; its arrays have no columns, so it can be stacked on others."""
        text = self.config.text
        cache = KVCache(text.num_hidden_layers, batch)
        nothing = mx.zeros((batch, text.num_key_value_heads, 0, text.head_dim), self._dtype)
        cache.layers = [(nothing, nothing)] * text.num_hidden_layers
        return cache

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        t = ids.shape[1]
        new = np.arange(t) < lengths[:, None]
        positions = cache.positions[:, None] + np.arange(t)
        hidden, added = self.decoder(
            self.embed_tokens(mx.array(ids)), t, mx.array(positions), cache.text_mask(new), cache.layers
        )
        cache.append(added, new)
        return self.lm_head(hidden[mx.arange(len(ids)), mx.array(lengths - 1)])

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]."""
        b, t = ids.shape
        positions = mx.broadcast_to(mx.arange(t)[None], (b, t))
        cache = self.new_cache(b)
        x = self.embed_tokens(ids)
        return self.lm_head(
            self.decoder(x, t, positions, cache.text_mask(np.ones((b, t), bool)), cache.layers)[0]
        )

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """The prompt as one block of text: BOS, tokens, EOS. The picture's own block begins with its begin token."""
        return [self.config.bos_token_id, *ids, self.config.eos_token_id]

    def guide(self, prefixes: Sequence[Sequence[int]], negative: Sequence[int] | None = None) -> KVCache:
        """Nothing at all, so that the picture begins at position 0; or the block of a negative prompt."""
        return self.new_cache(1) if negative is None else super().guide(prefixes, negative)

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], seen after the frozen cache."""
        return flow_velocity(x, angle, lambda state, t: self.flow(state, t, cache))

    def guided(
        self,
        conditional: mx.array,
        unconditional: mx.array,
        scale: float,
        x: mx.array | None = None,
        angle: float | None = None,
    ) -> mx.array:
        """The official guidance of a prompt: between velocities of the flow, no longer than without guidance."""
        if x is None or angle is None:
            return super().guided(conditional, unconditional, scale)
        state, v, t = trigflow.trigflow_to_flow(x, conditional, angle)
        without = trigflow.trigflow_to_flow(x, unconditional, angle)[1]
        u = BagelGuidance(text_scale=scale, image_scale=1.0)(v, without, None)
        return trigflow.flow_to_trigflow(state, u, t)[1]

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read a user's picture [B, H, W, 3] in [0, 1] for understanding; returns the logits [B, V] after it.

        H and W may be other multiples of the patch than `input_size`. Raises UserError for other sizes.
        """
        patch, side = self.config.vision_patch_size, self.config.vision_table_side
        if any(size % patch or not 0 < size <= patch * side for size in pixels.shape[1:3]):
            raise UserError(
                f"a picture of {pixels.shape[2]}x{pixels.shape[1]} pixels cannot be read: its sides must be "
                f"multiples of {patch} up to {patch * side}"
            )
        tokens = self.feature_vectors(pixels * 2 - 1)
        hidden = self._read_picture_block(tokens, cache, latents=False, store=True)
        return self.lm_head(hidden[:, -1])

    def describe_prompt(self) -> tuple[list[int], list[int]]:
        """The config's own question."""
        return self.question_prompt(self.config.question)

    def question_prompt(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """Nothing before the picture; the question's block and the answer's BOS behind it."""
        return [], [*self.image_prefix(question), self.config.bos_token_id]

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the finished picture [B, N, P] as the official program reads a picture to edit: in two blocks.

        First its latents, then what the vision transformer sees of it.
        """
        self.read_latents(x0, cache)
        self.read_picture(self._fitted(self.decode(x0)), cache)

    def read_source(self, pixels: mx.array, cache: KVCache) -> None:
        """Read a picture [B, H, W, 3] in [0, 1] that shall be edited, of `picture_size`: latents, then features."""
        self.read_latents(self.encode(pixels), cache)
        self.read_picture(self._fitted(pixels), cache)

    @property
    def edit_size(self) -> tuple[int, int]:
        """A picture is edited in the size that is painted."""
        return self.picture_size

    def read_edit(self, pixels: mx.array | None, ids: Sequence[int]) -> KVCache:
        """The source's two blocks, and the instruction's where there is one."""
        cache = self.new_cache(1)
        if pixels is not None:
            self.read_source(pixels, cache)
        if ids:
            block = self.image_prefix(ids)
            self.extend_text(np.array([block]), np.array([len(block)]), cache)
        return cache

    def unpictured(self, ids: Sequence[int]) -> Sequence[int]:
        """All of it: the source's guidance leads away from the instruction alone."""
        return ids

    def guided_edit(
        self,
        full: mx.array,
        source: mx.array,
        nothing: mx.array | None,
        scales: tuple[float, float],
        x: mx.array,
        angle: float,
    ) -> mx.array:
        """The official guidance, between velocities of the flow, no longer than without guidance."""
        state, v, t = trigflow.trigflow_to_flow(x, full, angle)
        without_text, without_image = (
            None if u is None else trigflow.trigflow_to_flow(x, u, angle)[1] for u in (source, nothing)
        )
        assert without_text is not None
        guided = BagelGuidance(text_scale=scales[0], image_scale=scales[1])(v, without_text, without_image)
        return trigflow.flow_to_trigflow(state, guided, t)[1]

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> normalised latents in patches [B, N, P]: the means of their distributions.

        The official program draws from the distributions. H and W may be other multiples of the stride.
        """
        coder = self.autoencoder
        return patchify(coder.normalize(coder.encode(pixels * 2 - 1).mean), self.config.latent_patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Normalised latents [B, N, P] -> pixels [B, H, W, 3], clipped to [0, 1]."""
        c, coder = self.config, self.autoencoder
        height, width = (side // c.autoencoder.factor for side in self.picture_size)
        z = unpatchify(patches, height, width, c.latent_patch_size)
        return mx.clip((coder.decode(coder.denormalize(z)) + 1) / 2, 0, 1)

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _read_picture_block(self, tokens: mx.array, cache: KVCache, latents: bool, store: bool) -> mx.array:
        """Hidden states of a picture's block behind the cache, and into it if `store`.

        The block is begin, tokens [B, N, D], end; with `latents` it is held as begin, end, tokens, because the
        first two are no latents (bagel_layers.py). All tokens have the cache's next position and see each other.
        """
        b, n, _ = tokens.shape
        ends = self.embed_tokens(mx.array([[self.config.boi_token_id, self.config.eoi_token_id]] * b))
        parts = [ends, tokens] if latents else [ends[:, :1], tokens, ends[:, 1:]]
        x = mx.concatenate(parts, 1)
        new = np.ones((b, n + 2), bool)
        positions = mx.array(np.repeat(cache.positions[:, None], n + 2, 1))
        hidden, added = self.decoder(
            x, 2 if latents else n + 2, positions, cache.picture_mask(new), cache.layers
        )
        if store:
            cache.append(added, new, advance=np.ones(b, int))
        return hidden

    def _fitted(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] in `input_size`."""
        height, width = self.input_size
        levels = np.array(mx.round(pixels.astype(mx.float32) * 255).astype(mx.uint8))
        fitted = [Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC) for p in levels]
        return mx.array(np.stack([np.asarray(p) for p in fitted]).astype(np.float32) / 255)

    @property
    def _dtype(self) -> mx.Dtype:
        return self.decoder.norm.weight.dtype


def _places(rows: int, columns: int, side: int) -> mx.array:
    """Where the patches of a picture stand in a square table of positions: int [rows * columns]."""
    return mx.array((np.arange(rows)[:, None] * side + np.arange(columns)).reshape(-1))


FAMILY = Family(BagelConfig, Bagel)
