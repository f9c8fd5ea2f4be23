"""Llama and its relatives (Qwen2, Qwen3, SmolLM, TinyLlama) as language models; their decoder serves other families.

Fields and parameter names are Hugging Face's, so that a folder of type "llama" is one for mlx-lm too.
Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import Family, TextFamily
from mlx_transfusion.models.layers import (
    LLAMA,
    Block,
    BlockConfig,
    KeysValues,
    Mask,
    Norm,
    Options,
    Past,
    RopeScaling,
)

_POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "kv_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches, named as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """None means one per attention head."""
    head_dim: int = 0
    """Width of a head; 0 means hidden_size / num_attention_heads (`to_dict` writes the number)."""
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_traditional: bool = False
    """Rotary pairs stand side by side in q and k, instead of in two halves."""
    attention_bias: bool = False
    """Biases of all four matrices of attention (Llama's meaning of the key)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values alone (Qwen2)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head (Qwen3)."""
    tie_word_embeddings: bool = False
    """The text head is the embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence."""
    bos_token_id: int | None = None
    add_bos_token: bool = True
    """Whether a text begins with BOS, where there is one."""
    eos_token_id: tuple[int, ...] = ()
    """Every token that ends a text or a turn of a chat."""
    pad_token_id: int | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_positive(self, "llama config", _POSITIVE)
        if self.head_dim <= 0 or self.head_dim % 2:
            raise UserError(
                f"llama config: head_dim is {self.head_dim}, expected an even number (rotary pairs)"
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"llama config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.hidden_act not in ("silu", "relu"):
            raise UserError(f'llama config: hidden_act is "{self.hidden_act}", expected silu or relu')
        self._check_scaling()
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_id):
            if token is not None and not 0 <= token < self.vocab_size:
                raise UserError(
                    f"llama config: token id {token} is outside the vocabulary of {self.vocab_size}"
                )

    def _check_scaling(self) -> None:
        s = self.rope_scaling
        if s is None:
            return
        if s.rope_type not in ("linear", "llama3"):
            raise UserError(
                f'llama config: rope_scaling has rope_type "{s.rope_type}", expected linear or llama3'
            )
        if not (s.factor >= 1 and 0 < s.low_freq_factor < s.high_freq_factor):
            raise UserError(
                "llama config: rope_scaling must have a factor of 1 or more, and a low_freq_factor above 0 and "
                "below its high_freq_factor"
            )
        if s.original_max_position_embeddings <= 0:
            raise UserError("llama config: rope_scaling needs a positive original_max_position_embeddings")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def options(self) -> Options:
        """How its blocks differ from Transfusion's."""
        return Options(
            qkv_bias=self.qkv_bias or self.attention_bias,
            out_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            rope_traditional=self.rope_traditional,
            rope_scaling=self.rope_scaling,
        )

    @cached_property
    def layout(self) -> Layout:
        """Text alone: BOS, where the family has one, and text until one of the ends."""
        special = {i for i in (self.bos_token_id, self.pad_token_id) if i is not None}
        return Layout(
            bos=self.bos_token_id if self.add_bos_token else None,
            eos=self.eos_token_id,
            pad=self.pad_token_id,
            banned=tuple(sorted(special - {*self.eos_token_id})),
            max_position=self.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self) | {"eos_token_id": list(self.eos_token_id)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """Read config.json's data strictly. Raises UserError for unknown or missing keys and wrong types."""
        return from_dict(cls, data, where)


class Decoder(nn.Module):
    """A stack of blocks and its final norm, on token vectors: what text and pictures pass alike."""

    def __init__(self, config: BlockConfig, options: Options = LLAMA) -> None:
        super().__init__()
        self.layers = [Block(config, options) for _ in range(config.num_hidden_layers)]
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    def run(
        self,
        x: mx.array,
        mask: Mask = "causal",
        offset: int | mx.array = 0,
        past: Sequence[Past] | None = None,
    ) -> tuple[mx.array, list[KeysValues]]:
        """Token vectors [B, T, D] from position `offset` on, behind `past` (one entry a layer; None: nothing).

        Returns the normalised hidden states [B, T, D], and each layer's keys and values of the T tokens, which
        `KVCache.append` takes.
        """
        added = []
        for layer, before in zip(self.layers, past or [None] * len(self.layers), strict=True):
            x, new = layer(x, mask, offset, before)
            added.append(new)
        return self.norm(x), added


class TokenConfig(BlockConfig, Protocol):
    """What a language model reads of its config."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def options(self) -> Options:
        """How its blocks differ from Transfusion's."""


class LanguageModel(Decoder):
    """A decoder with the embedding of tokens and, unless that is tied, a text head of its own (`lm_head`)."""

    def __init__(self, config: TokenConfig) -> None:
        super().__init__(config, config.options)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def read(self, ids: np.ndarray | mx.array, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read tokens [B, T], right-padded to `lengths` [B], into `cache`; hidden states [B, D] of each last one."""
        ids, lengths = mx.array(ids), np.asarray(lengths)  # ids on the device are not waited for
        new = np.arange(ids.shape[1]) < lengths[:, None]
        x = self.embed_tokens(ids)
        hidden, _ = self.run(x, cache.text_mask(new), cache.offset(), cache.slots())
        cache.advance(new)
        return hidden[mx.arange(len(ids)), mx.array(lengths - 1)]


class Llama(TextFamily):
    """A language model: it reads and writes text."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self._config = config
        self.model = LanguageModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def config(self) -> LlamaConfig:
        """The configuration the model was built from."""
        return self._config

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of texts [B, T]; padding on the right changes nothing before it."""
        return self.logits(self.model.run(self.model.embed_tokens(ids))[0])

    def logits(self, hidden: mx.array) -> mx.array:
        """Normalised hidden states [..., D] -> logits [..., V]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        return KVCache(self.config.num_hidden_layers, batch)

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`; returns logits [B, V]."""
        return self.logits(self.model.read(ids, lengths, cache))


FAMILY = Family(LlamaConfig, Llama)
