"""The decoder's building blocks in PyTorch: grouped-query attention with RoPE, gated feed-forward, pre-norm block.

The twins of `models/layers.py`, with its parameter names.
Shapes: B batch, T positions, S earlier positions, D width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.torch.attention import Attend, Mask, attend

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, each [B, K, S, E]."""


def rope_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., T, E/2], float32, of the positions [..., T]."""
    half = config.head_dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    turn = positions[..., None].float() * config.rope_theta**-exponent
    return turn.cos(), turn.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE on halves, as Llama: x [B, H, T, E] by `rope_angles` of [T] or [B, 1, T]. In float32 inside."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        self.head_dim = e
        self.q_proj = nn.Linear(d, config.num_attention_heads * e, bias=False)
        self.k_proj = nn.Linear(d, config.kv_heads * e, bias=False)
        self.v_proj = nn.Linear(d, config.kv_heads * e, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * e, d, bias=False)
        self.q_norm = nn.RMSNorm(e, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(e, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, mask: Mask, rope: tuple[Tensor, Tensor], past: KeysValues | None, attention: Attend
    ) -> tuple[Tensor, KeysValues]:
        """Attend from x [B, T, D] to `past` and itself; returns [B, T, D] and the T new keys and values."""
        b, t, _ = x.shape
        # As many heads as this process has of a layer that is cut over several (`tensor_parallel.py`).
        q, k, v = (
            project(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        out = attention(q, keys, values, mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1)), (k, v)


class MLP(nn.Module):
    """Gated feed-forward layer: SwiGLU, or ReGLU by config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.act = F.silu if config.hidden_act == "silu" else F.relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        rope: tuple[Tensor, Tensor],
        past: KeysValues | None = None,
        attention: Attend = attend,
    ) -> tuple[Tensor, KeysValues]:
        """As Attention: returns the new hidden states [B, T, D] and the new keys and values."""
        attended, new = self.self_attn(self.input_layernorm(x), mask, rope, past, attention)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), new
