"""Show-o2's flow head: transformer blocks behind the language model, steered by the time where a picture stands.

It reads the whole row, text too, with rotary positions of its own; text passes unsteered. What steers a token is
chosen by its kind: 0 is text, k > 0 the k-th of the times that are given.
Shapes: B rows, T positions, D the head's width, K times.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.gates import silu
from mlx_transfusion.models.layers import MLP, Attention, Options, RopeScaling
from mlx_transfusion.models.vision_layers import gelu_erf

Neutral = tuple[float, ...]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the head; the defaults are the published ones."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 10
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    block_norm_eps: float = 1e-5
    """Of the norms before attention and feed-forward layer."""
    rms_norm_eps: float = 1e-6
    """Of all others."""
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling = field(default_factory=lambda: RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        check_positive(
            self, "head config",
            ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "block_norm_eps", "rms_norm_eps", "rope_theta"),
        )  # fmt: skip
        if self.hidden_act != "silu" or self.rope_scaling.rope_type != "llama3":
            raise UserError("head config: expected hidden_act silu and rope_scaling of rope_type llama3")
        if (
            self.hidden_size % (2 * self.num_attention_heads)
            or self.num_attention_heads % self.num_key_value_heads
        ):
            raise UserError(
                f"head config: hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}, and that a multiple of num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qk_norm(self) -> bool:
        """Queries and keys of each head are normalised."""
        return True


class Steering(nn.Module):
    """A linear map of the time: `len(neutral)` vectors for each token, and the neutral ones for text."""

    def __init__(self, width: int, neutral: Neutral) -> None:
        super().__init__()
        self._neutral = neutral
        self.linear = nn.Linear(width, len(neutral) * width)

    def __call__(self, times: mx.array, kinds: mx.array) -> list[mx.array]:
        """Embedded times [B, K, D] and kinds [B, T] of 0 to K -> arrays [B, T, D]."""
        b, k, d = times.shape
        n = len(self._neutral)
        values = self.linear(silu(times)).reshape(b, k, n, d)
        text = mx.broadcast_to(mx.array(self._neutral, values.dtype)[None, None, :, None], (b, 1, n, d))
        rows = mx.concatenate([text, values], 1)[mx.arange(b)[:, None], kinds]
        return [rows[:, :, i] for i in range(n)]


class HeadBlock(nn.Module):
    """Pre-norm transformer block whose branches are shifted, scaled and gated by the time."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.block_norm_eps
        self.input_layernorm = nn.RMSNorm(d, eps=eps)
        self.self_attn = Attention(config, Options(rope_scaling=config.rope_scaling))
        self.post_attention_layernorm = nn.RMSNorm(d, eps=eps)
        self.mlp = MLP(config)
        self.steering = Steering(d, (0.0, 0.0, 1.0) * 2)

    def __call__(self, x: mx.array, times: mx.array, kinds: mx.array, mask: mx.array) -> mx.array:
        """Hidden states [B, T, D] of whole rows, from position 0 on -> [B, T, D]; mask bool [B, 1, T, T]."""
        shift, scale, gate, shift2, scale2, gate2 = self.steering(times, kinds)
        attended, _ = self.self_attn(self.input_layernorm(x) * (1 + scale) + shift, mask)
        x = x + gate * attended
        return x + gate2 * self.mlp(self.post_attention_layernorm(x) * (1 + scale2) + shift2)


class FlowHead(nn.Module):
    """From the language model's hidden states to the numbers of every token's velocity."""

    def __init__(self, config: HeadConfig, width: int, outputs: int) -> None:
        super().__init__()
        d = config.hidden_size
        if width != d:
            self.fc1 = nn.Linear(width, d)
            self.fc2 = nn.Linear(d, d)
        self.layers = [HeadBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.steering = Steering(d, (0.0, 0.0))
        self.linear = nn.Linear(d, outputs)

    def enter(self, hidden: mx.array) -> mx.array:
        """The language model's normalised hidden states [B, T, W] in the head's width: [B, T, D]."""
        return self.fc2(gelu_erf(self.fc1(hidden))) if "fc1" in self else hidden

    def leave(self, x: mx.array, times: mx.array, kinds: mx.array) -> mx.array:
        """Hidden states [B, T, D] behind the blocks -> [B, T, outputs]."""
        shift, scale = self.steering(times, kinds)
        return self.linear(self.norm(x) * (1 + scale) + shift)

    def __call__(self, hidden: mx.array, times: mx.array, kinds: mx.array, mask: mx.array) -> mx.array:
        """Hidden states [B, T, W] of whole rows -> hidden states [B, T, D], before `leave`."""
        x = self.enter(hidden)
        for layer in self.layers:
            x = layer(x, times, kinds, mask)
        return x
