"""A Llama that also paints: text passes its own weights, unchanged, and a picture passes weights of its own.

Image tokens see the text through the keys and values of the text's layers, and have either a second copy of those
layers ("experts": Mixture-of-Transformers, arXiv 2411.04996; LMFusion, arXiv 2412.15188) or low-rank factors beside
them (arXiv 2106.09685). Text never sees a picture, so whatever the model wrote before, it writes now.

A picture is the answer to a user's turn: chat template, one token that writing never uses as begin-of-image, picture.
The vocabulary stays as it is. One linear layer on the hidden state before an answer says whether that is a picture.
Shapes: B pictures, N patches of P numbers, D width, S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, PictureFamily
from mlx_transfusion.models.layers import KeysValues, Mask
from mlx_transfusion.models.llama import Llama
from mlx_transfusion.models.llama_painter_config import LlamaPainterConfig
from mlx_transfusion.models.llama_painter_parts import LowRankBlock, PictureSide
from mlx_transfusion.models.patches import patchify, unpatchify


class LlamaPainter(Llama, PictureFamily):
    """A Llama with a picture side."""

    def __init__(self, config: LlamaPainterConfig) -> None:
        super().__init__(config)
        self.painter = PictureSide(config)

    @property
    def config(self) -> LlamaPainterConfig:
        """The configuration the model was built from."""
        config = self._config
        assert isinstance(config, LlamaPainterConfig)
        return config

    # ---- training and distillation: the passes of Transfusion's on plain arrays ----------------------------------

    def read_prefix(self, ids: mx.array) -> tuple[mx.array, list[KeysValues]]:
        """Read prompts [B, S], padded on the right, that begin with `prompt_before` as those of `image_prefix`.

        Returns the final hidden states [B, S, D] and each layer's keys and values. The common beginning is read once.
        """
        common = len(self.config.prompt_before)
        if not 0 < common < ids.shape[1]:
            return self.model.run(self.model.embed_tokens(ids))
        first, begun = self.read_common()
        hidden, rest = self.read_rest(ids[:, common:], begun)
        rows = ids.shape[0]
        joined = [join_columns(repeat_rows(b, rows), r) for b, r in zip(begun, rest, strict=True)]
        return mx.concatenate([mx.repeat(first, rows, 0), hidden], 1), joined

    def read_common(self) -> tuple[mx.array, list[KeysValues]]:
        """Read `prompt_before`: hidden states [1, S, D], and each layer's keys and values."""
        return self.model.run(self.model.embed_tokens(mx.array([self.config.prompt_before])))

    def read_rest(self, ids: mx.array, begun: Sequence[KeysValues]) -> tuple[mx.array, list[KeysValues]]:
        """Read what follows `prompt_before` [B, S] behind its keys and values [1, ...]; gives the new ones."""
        past = [repeat_rows(kv, ids.shape[0]) for kv in begun]
        return self.model.run(self.model.embed_tokens(ids), "causal", len(self.config.prompt_before), past)

    def paint(
        self,
        x: mx.array,
        angle: mx.array,
        prefix: Sequence[KeysValues] | Mapping[int, KeysValues],
        lengths: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], behind a read prefix.

        prefix: by layer; only those of `painter_layers` are looked at. lengths int [B] counts its real tokens.
        guidance: not known to this family; ignored.
        """
        n, columns = x.shape[1], prefix[self.config.painter_layers[0]][0].shape[2]
        seen = mx.arange(columns) < lengths[:, None]
        mask = mx.concatenate([seen, mx.ones((x.shape[0], n), mx.bool_)], 1)[:, None, None]
        return self._paint(x, angle, mask, lengths, prefix)

    def cos_velocity(
        self, x: mx.array, angle: mx.array, prefix: Sequence[KeysValues], lengths: mx.array
    ) -> mx.array:
        """cos(angle) times `paint`: [B, N, P]."""
        return mx.cos(angle)[:, None, None] * self.paint(x, angle, prefix, lengths)

    def wishes(self, hidden: mx.array) -> mx.array:
        """Log-odds [...] that the answer behind hidden states [..., D] of a prompt's last tokens is a picture."""
        # Final hidden states are long vectors: scaled, so that this layer's gradient does not drown all others.
        return self.painter.wish(hidden * self.config.hidden_size**-0.5)[..., 0]

    def _paint(
        self,
        x: mx.array,
        angle: mx.array,
        mask: Mask,
        offset: int | mx.array,
        past: Sequence[KeysValues] | Mapping[int, KeysValues],
    ) -> mx.array:
        side = self.painter
        embedded = side.angle_embedding(angle)
        tokens, skips = side.patch_encoder(x, embedded)
        hidden = tokens.astype(side.norm.weight.dtype)
        for at, layer in zip(self.config.painter_layers, side.layers, strict=True):
            block = layer.beside(self.model.layers[at]) if isinstance(layer, LowRankBlock) else layer
            hidden, _ = block(hidden, mask, offset, past[at])
        return side.patch_decoder(side.norm(hidden), x, embedded, skips)

    # ---- the interface of every family (family.py) --------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(patches of a picture, numbers in a patch)."""
        return self.config.pictures.patches_per_image, self.config.pictures.patch_dim

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.config.image_height, self.config.image_width

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """As a Llama's, but for two tokens: begin-of-image may open an answer, and end-of-image closes one."""
        hidden = self.model.read(ids, lengths, cache)
        logits = self.logits(hidden)
        asked, done = self._ends(np.asarray(ids), np.asarray(lengths))
        numbers = mx.arange(logits.shape[-1])
        boi = numbers == self.config.boi_token_id
        wish = (logits.max(-1) + self.wishes(hidden))[:, None]
        logits = mx.where(boi, mx.where(mx.array(asked)[:, None], wish, -mx.inf), logits)
        if done.any() and self.config.eos_token_id:
            closed = mx.where(numbers == self.config.eos_token_id[0], 0.0, -mx.inf)
            logits = mx.where(mx.array(done)[:, None], closed, logits)
        return logits

    def prompt_text(self, prompt: str) -> str:
        """The prompt without the spaces around it: the chat template stands in the config, in tokens."""
        return prompt.strip()

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """A user's turn, the beginning of the answer, begin-of-image."""
        c = self.config
        return [*c.prompt_before, *ids, *c.prompt_after, c.boi_token_id]

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B], seen after the frozen cache."""
        mask = cache.picture_mask(np.ones(x.shape[:2], bool))
        past = [kv for kv in cache.layers if kv is not None]
        return self._paint(x, angle, mask, cache.offset(), past)

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Nothing: the text's weights know no pictures, and a picture ends the answer."""

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> patches [B, N, P] with unit standard deviation."""
        c = self.config
        return patchify((pixels * 2 - 1 - mx.array(c.image_mean)) / c.image_std, c.patch_size)

    def decode(self, patches: mx.array) -> mx.array:
        """Patches [B, N, P] -> pixels [B, H, W, 3], clipped to [0, 1]."""
        c = self.config
        x = unpatchify(patches, c.image_height, c.image_width, c.patch_size)
        return mx.clip((x * c.image_std + mx.array(c.image_mean) + 1) / 2, 0, 1)

    def _ends(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of ids [B, T] end where the model answers, and which with end-of-image. bool [B] each."""
        after = self.config.prompt_after
        texts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
        asked = [bool(after) and text[-len(after) :] == list(after) for text in texts]
        return np.array(asked), np.array([text[-1:] == [self.config.eoi_token_id] for text in texts])


def repeat_rows(kv: KeysValues, rows: int) -> KeysValues:
    """Keys and values of one row for `rows` of them."""
    return mx.repeat(kv[0], rows, 0), mx.repeat(kv[1], rows, 0)


def join_columns(first: KeysValues, then: KeysValues) -> KeysValues:
    """Keys and values of tokens that follow one another."""
    return mx.concatenate([first[0], then[0]], 2), mx.concatenate([first[1], then[1]], 2)


def with_picture_side(model: Llama, config: LlamaPainterConfig) -> LlamaPainter:
    """A float Llama with a fresh picture side, whose layers or norms begin as copies of the text's."""
    out = LlamaPainter(config)
    out.model.update(model.model.parameters())
    if "lm_head" in model:
        out.lm_head.update(model.lm_head.parameters())
    for at, layer in zip(config.painter_layers, out.painter.layers, strict=True):
        theirs = model.model.layers[at].parameters()
        own = {name: theirs[name] for name in layer.parameters() if name in theirs}
        # Copies: the same array cannot be trained in one place and be a constant of a compiled step in another.
        layer.update(tree_map(lambda w: w + 0, own))
    out.painter.norm.weight = model.model.norm.weight + 0
    return out


FAMILY = Family(LlamaPainterConfig, LlamaPainter)
