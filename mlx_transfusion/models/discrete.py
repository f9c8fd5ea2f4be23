"""The discrete baseline (arXiv 2408.11039, section 4.2, after Chameleon, arXiv 2405.09818): pictures as words.

A quantizer cuts a picture into N codes, and the codes are ids of the vocabulary, behind those of text. The blocks are
Transfusion's, attention is causal everywhere, and the only loss is that of the next token.
Shapes: B rows, T positions, D width, V vocabulary with its codes, N codes of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.models.family import CodeFamily, Family
from mlx_transfusion.models.layers import Mask
from mlx_transfusion.models.llama import LanguageModel


class Quantizer(Protocol):
    """What turns pictures into codes and back (an autoencoder with a codebook)."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""

    @property
    def factor(self) -> int:
        """Pixels along one side of a code."""

    def encode_codes(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, h, w]."""

    def decode_codes(self, codes: mx.array) -> mx.array:
        """Codes [B, h, w] -> pixels [B, H, W, 3], about [0, 1]."""


@dataclass(frozen=True)
class CodeBook:
    """The quantizer whose codes a model writes, and the folder that it was read from."""

    model: Quantizer
    path: Path


class Discrete(CodeFamily):
    """Embedding and head of text tokens and codes, and one transformer in between."""

    def __init__(self, config: DiscreteConfig) -> None:
        super().__init__()
        self._config = config
        self.coder: CodeBook | None = None
        """What turns codes into pictures; no part of the weights. None: it reads and writes bare codes."""
        self.model = LanguageModel(config)
        table = self.model.embed_tokens
        table.weight = mx.random.normal(table.weight.shape)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def config(self) -> DiscreteConfig:
        """The configuration the model was built from."""
        return self._config

    def __call__(self, ids: mx.array, mask: Mask = "causal") -> mx.array:
        """Hidden states [B, T, D] of ids [B, T], text tokens and codes; `logits` makes predictions of them."""
        return self.model.run(self.model.embed_tokens(ids), mask)[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [..., D] -> logits [..., V] of the tokens that follow."""
        return self.lm_head(hidden)

    # ---- the interface of every family (family.py) ---------------------------------------------------------------

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(self.config.num_hidden_layers, batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read tokens [B, T], codes among them, right-padded to `lengths` [B], into `cache`; logits [B, V]."""
        return self.logits(self.model.read(ids, lengths, cache))

    @property
    def first_code(self) -> int:
        """Id of code 0."""
        return self.config.first_code

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(codes of a picture, 1)."""
        return self.config.patches_per_image, 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width); of the grid of codes without a quantizer."""
        factor = 1 if self.coder is None else self.coder.model.factor
        return self.config.image_height * factor, self.config.image_width * factor

    @property
    def picture_channels(self) -> int:
        """3. Raises UserError without a quantizer."""
        self._quantizer()
        return 3

    def attach(self, quantizer: Quantizer, path: Path) -> None:
        """Give it the quantizer in the folder `path`. Raises UserError for a codebook of another size."""
        theirs, ours = quantizer.codebook_size, self.config.codebook_size
        if theirs != ours:
            raise UserError(
                f"{path}: its codebook has {theirs} codes, and the model's vocabulary has places for {ours}: use the "
                "autoencoder that the model was trained with"
            )
        self.coder = CodeBook(quantizer, path)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, N], row by row. Raises UserError without a quantizer."""
        codes = self._quantizer().encode_codes(pixels)
        return codes.reshape(len(codes), -1)

    def decode(self, patches: mx.array) -> mx.array:
        """Codes [B, N] -> pixels [B, H, W, 3], clipped to [0, 1]. Raises UserError without a quantizer."""
        c = self.config
        pixels = self._quantizer().decode_codes(patches.reshape(-1, c.image_height, c.image_width))
        return mx.clip(pixels, 0, 1)

    def _quantizer(self) -> Quantizer:
        if self.coder is None:
            raise UserError(
                "the model writes the codes of an autoencoder, and its folder has none: put the one that it was "
                "trained with beside its weights, as the folder autoencoder"
            )
        return self.coder.model


FAMILY = Family(DiscreteConfig, Discrete)
