"""The decoder's building blocks: grouped-query attention with RoPE, gated feed-forward, pre-norm block.

Llama's design (arXiv 2408.11039, section 3.3 and footnote 4); parameter names follow Hugging Face's Llama.
Shapes: B batch, T positions, S cached positions, D width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.gates import relu, silu

KeysValues = tuple[mx.array, mx.array]
"""Rotated keys and values of one layer, each [B, K, S, E]."""


class Slot(Protocol):
    """One layer's place in a cache that grows where it stands (`KVCache.slots`)."""

    def join(self, k: mx.array, v: mx.array) -> KeysValues:
        """Write the keys and values [B, K, T, E] of new tokens; returns those of all tokens [B, K, S+T, E]."""


Past = KeysValues | Slot | None
"""What attention finds before its tokens: keys and values, a place that takes new ones too, or nothing."""

Mask = mx.array | str | None
"""Boolean [B, 1, T, S+T] (True = look), the string "causal", or None (everything is visible)."""


class MLPConfig(Protocol):
    """What a feed-forward layer reads of a family's config."""

    @property
    def hidden_size(self) -> int:
        """Width D."""

    @property
    def intermediate_size(self) -> int:
        """Width between the matrices."""

    @property
    def hidden_act(self) -> str:
        """Gate: "silu" or "relu"."""


class BlockConfig(MLPConfig, Protocol):
    """What a block reads of a family's config: sizes, and the options that Transfusion has too."""

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the stack: fresh weights start the smaller, the more there are."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads H."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""

    @property
    def head_dim(self) -> int:
        """Width E of a head; H*E need not be D."""

    @property
    def rms_norm_eps(self) -> float:
        """Added to the mean square in every norm."""

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys pass an RMSNorm of width E each."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions for texts that are longer than those of pretraining, as config.json of Llama 3.1 has them.

    "linear" divides all positions by `factor`. "llama3" divides the frequencies of long waves only: those that do
    not turn `low_freq_factor` times within the original length; those that turn more than `high_freq_factor` times
    stay, and between the two it is mixed.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def periods(self, head_dim: int, theta: float) -> mx.array:
        """Positions for one radian [E/2], of each rotary pair."""
        plain = theta ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)
        if self.rope_type == "linear":
            return plain * self.factor
        turns = self.original_max_position_embeddings / (2 * math.pi * plain)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = mx.clip(kept, 0, 1)
        return plain / (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Options:
    """What relatives of Llama do differently; the defaults are Llama's and Transfusion's."""

    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    out_bias: bool = False
    """Bias of attention's output."""
    mlp_bias: bool = False
    rope_traditional: bool = False
    """Rotary pairs stand side by side (GGUF) instead of in the two halves of a head."""
    rope_scaling: RopeScaling | None = None
    post_norm: bool = False
    """Norms on the outputs of attention and feed-forward layer instead of on their inputs (Swin v2, arXiv
    2111.09883, 3.2; Chameleon, arXiv 2405.09818, 2.3): no branch can grow faster than the sum."""


LLAMA = Options()


class Norm(nn.RMSNorm):
    """RMSNorm that keeps its input's precision, where the weight has a higher one (GGUF: float32 beside float16)."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] -> [..., D]."""
        return super().__call__(x).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional RMSNorm on queries and keys."""

    def __init__(self, config: BlockConfig, options: Options = LLAMA) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        self._heads, self._kv_heads, self._head_dim = config.num_attention_heads, config.kv_heads, e
        self._theta, self._traditional = config.rope_theta, options.rope_traditional
        scaling = options.rope_scaling
        self._periods = None if scaling is None else scaling.periods(e, config.rope_theta)
        self.q_proj = nn.Linear(d, config.num_attention_heads * e, bias=options.qkv_bias)
        self.k_proj = nn.Linear(d, config.kv_heads * e, bias=options.qkv_bias)
        self.v_proj = nn.Linear(d, config.kv_heads * e, bias=options.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * e, d, bias=options.out_bias)
        if config.qk_norm:
            self.q_norm = Norm(e, eps=config.rms_norm_eps)
            self.k_norm = Norm(e, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Mask, offset: int | mx.array = 0, past: Past = None
    ) -> tuple[mx.array, KeysValues]:
        """Attend from `x` [B, T, D] to `past` and itself.

        `offset` is the position of the first of the T tokens, one number or one per row [B].
        Returns the output [B, T, D] and the keys and values of the T new positions.
        """
        b, t, _ = x.shape
        q = self._split(self.q_proj(x), self._heads)
        k = self._split(self.k_proj(x), self._kv_heads)
        v = self._split(self.v_proj(x), self._kv_heads)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q, offset), self._rotate(k, offset)
        keys, values = join(past, k, v)
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._head_dim**-0.5, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(b, t, -1)), (k, v)

    def _split(self, x: mx.array, heads: int) -> mx.array:
        """[B, T, heads*E] -> [B, heads, T, E]."""
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self._head_dim,
            traditional=self._traditional,
            base=self._theta if self._periods is None else None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )


def join(past: Past, k: mx.array, v: mx.array) -> KeysValues:
    """Keys and values of what came before and of new tokens, [B, K, S+T, E] each."""
    if past is None:
        return k, v
    if isinstance(past, tuple):
        return mx.concatenate([past[0], k], 2), mx.concatenate([past[1], v], 2)
    return past.join(k, v)


class MLP(nn.Module):
    """Gated feed-forward layer: SwiGLU, or ReGLU by config (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: MLPConfig, bias: bool = False) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)
        self._act = silu if config.hidden_act == "silu" else relu

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Transformer block: norms before attention and feed-forward layer, or behind them (`Options.post_norm`)."""

    def __init__(self, config: BlockConfig, options: Options = LLAMA) -> None:
        super().__init__()
        self._post_norm = options.post_norm
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, options)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, options.mlp_bias)
        # Residual branches start small, so that the sum over 2L of them keeps unit scale (GPT-2's rule).
        shrink = (2 * config.num_hidden_layers) ** -0.5
        self.self_attn.o_proj.weight = self.self_attn.o_proj.weight * shrink
        self.mlp.down_proj.weight = self.mlp.down_proj.weight * shrink

    def __call__(
        self, x: mx.array, mask: Mask, offset: int | mx.array = 0, past: Past = None
    ) -> tuple[mx.array, KeysValues]:
        """As Attention: returns the new hidden states [B, T, D] and the new keys and values."""
        if self._post_norm:
            attended, new = self.self_attn(x, mask, offset, past)
            x = x + self.input_layernorm(attended)
            return x + self.post_attention_layernorm(self.mlp(x)), new
        attended, new = self.self_attn(self.input_layernorm(x), mask, offset, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), new
