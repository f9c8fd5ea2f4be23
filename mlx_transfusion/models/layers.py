"""The decoder's building blocks: grouped-query attention with RoPE, gated feed-forward, pre-norm block.

Llama's design (arXiv 2408.11039, section 3.3 and footnote 4); parameter names follow Hugging Face's Llama.
Shapes: B batch, T positions, S cached positions, D width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import ModelConfig

KeysValues = tuple[mx.array, mx.array]
"""Rotated keys and values of one layer, each [B, K, S, E]."""

Mask = mx.array | str | None
"""Boolean [B, 1, T, S+T] (True = look), the string "causal", or None (everything is visible)."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        self._heads, self._kv_heads, self._head_dim = config.num_attention_heads, config.kv_heads, e
        self._theta = config.rope_theta
        self.q_proj = nn.Linear(d, config.num_attention_heads * e, bias=False)
        self.k_proj = nn.Linear(d, config.kv_heads * e, bias=False)
        self.v_proj = nn.Linear(d, config.kv_heads * e, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * e, d, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(e, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(e, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Mask, offset: int | mx.array = 0, past: KeysValues | None = None
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
        keys, values = (
            (k, v) if past is None else (mx.concatenate([past[0], k], 2), mx.concatenate([past[1], v], 2))
        )
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._head_dim**-0.5, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(b, t, -1)), (k, v)

    def _split(self, x: mx.array, heads: int) -> mx.array:
        """[B, T, heads*E] -> [B, heads, T, E]."""
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, self._head_dim, traditional=False, base=self._theta, scale=1.0, offset=offset)


class MLP(nn.Module):
    """Gated feed-forward layer: SwiGLU, or ReGLU by config (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self._act = silu if config.hidden_act == "silu" else _relu

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x). Not mlx's own, which is compiled: that has no gradient inside a forward-mode derivative."""
    return x * mx.sigmoid(x)


def _relu(x: mx.array) -> mx.array:
    return x * (x > 0)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        # Residual branches start small, so that the sum over 2L of them keeps unit scale (GPT-2's rule).
        shrink = (2 * config.num_hidden_layers) ** -0.5
        self.self_attn.o_proj.weight = self.self_attn.o_proj.weight * shrink
        self.mlp.down_proj.weight = self.mlp.down_proj.weight * shrink

    def __call__(
        self, x: mx.array, mask: Mask, offset: int | mx.array = 0, past: KeysValues | None = None
    ) -> tuple[mx.array, KeysValues]:
        """As Attention: returns the new hidden states [B, T, D] and the new keys and values."""
        attended, new = self.self_attn(self.input_layernorm(x), mask, offset, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), new
