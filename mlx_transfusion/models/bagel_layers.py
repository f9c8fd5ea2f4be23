"""BAGEL's decoder (arXiv 2505.14683, section 2): two experts a layer, and one attention that joins them.

Text, a picture's semantic features and the tokens around pictures pass the weights `understand`; latents of the
autoencoder, noisy or clean, pass `generate`. A pass holds its latents last, so that one number says which tokens go
where. That order is free: all tokens of a picture see each other and share one rotary position.
Shapes: B rows, T positions, S cached positions, D width, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.layers import MLP, KeysValues


@dataclass(frozen=True)
class BagelTextConfig:
    """Sizes of the decoder, the same for both experts; names follow Qwen2's config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        check_positive(
            self, "text config",
            ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
             "max_position_embeddings"),
        )  # fmt: skip
        if self.hidden_act != "silu":
            raise UserError(f'text config: hidden_act is "{self.hidden_act}", expected silu')
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"text config: hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"text config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Turn(NamedTuple):
    """Cosines and sines [B, 1, T, E/2] of the rotary positions of one pass, the same in every layer."""

    cos: mx.array
    sin: mx.array

    @classmethod
    def at(cls, positions: mx.array, head_dim: int, theta: float) -> Turn:
        """Of positions [B, T], which may repeat and jump."""
        frequencies = theta ** (-mx.arange(0, head_dim, 2) / head_dim)
        angles = positions.astype(mx.float32)[:, None, :, None] * frequencies
        return cls(mx.cos(angles), mx.sin(angles))

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate [B, heads, T, E], whose two halves are the pairs' two members (Llama's order)."""
        a, b = mx.split(x, 2, axis=-1)
        out = mx.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)
        return out.astype(x.dtype)


class Expert(nn.Module):
    """One set of a layer's weights: norms, projections of attention, feed-forward layer."""

    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(d, self._heads * e)
        self.k_proj = nn.Linear(d, self._kv_heads * e)
        self.v_proj = nn.Linear(d, self._kv_heads * e)
        self.q_norm = nn.RMSNorm(e, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(e, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(self._heads * e, d, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Hidden states [B, T, D] -> normalised queries [B, T, H, E], and keys and values [B, T, K, E]."""
        x = self.input_layernorm(x)
        q = self.q_proj(x).reshape(*x.shape[:2], self._heads, -1)
        k = self.k_proj(x).reshape(*x.shape[:2], self._kv_heads, -1)
        v = self.v_proj(x).reshape(*x.shape[:2], self._kv_heads, -1)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: mx.array, attended: mx.array) -> mx.array:
        """What the layer gives for hidden states [B, T, D] and their attention [B, T, H*E]."""
        x = x + self.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class BagelLayer(nn.Module):
    """Both experts of a layer, and the attention of all tokens to all that the mask allows."""

    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        self._scale = config.head_dim**-0.5
        self.understand = Expert(config)
        self.generate = Expert(config)

    def __call__(
        self, x: mx.array, plain: int, turn: Turn, mask: mx.array | str | None, past: KeysValues | None = None
    ) -> tuple[mx.array, KeysValues]:
        """Hidden states [B, T, D], the first `plain` of them not latents -> new ones, and new keys and values."""
        b, t, _ = x.shape
        projected = by_kind(self.understand.project, self.generate.project, plain, x)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in projected)
        q, k = turn(q), turn(k)
        keys, values = (
            (k, v) if past is None else (mx.concatenate([past[0], k], 2), mx.concatenate([past[1], v], 2))
        )
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._scale, mask=mask)
        out = out.transpose(0, 2, 1, 3).reshape(b, t, -1)
        return by_kind(self.understand.finish, self.generate.finish, plain, x, out), (k, v)


class BagelDecoder(nn.Module):
    """The stack of layers and its two final norms, on token vectors."""

    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        self._head_dim, self._theta = config.head_dim, config.rope_theta
        self.layers = [BagelLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_generate = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def turn(self, positions: mx.array) -> Turn:
        """The rotation of tokens at positions [B, T]."""
        return Turn.at(positions, self._head_dim, self._theta)

    def __call__(
        self,
        x: mx.array,
        plain: int,
        positions: mx.array,
        mask: mx.array | str | None,
        past: Sequence[KeysValues | None],
    ) -> tuple[mx.array, list[KeysValues]]:
        """Token vectors [B, T, D], the first `plain` not latents, at positions [B, T] behind `past`.

        Returns the normalised hidden states [B, T, D] and each layer's new keys and values.
        """
        turn = self.turn(positions)
        added = []
        for layer, before in zip(self.layers, past, strict=True):
            x, new = layer(x, plain, turn, mask, before)
            added.append(new)
        return by_kind(self.norm, self.norm_generate, plain, x), added


def by_kind(
    understand: Callable[..., Any], generate: Callable[..., Any], plain: int, *arrays: mx.array
) -> Any:
    """One function for the first `plain` tokens of arrays [B, T, ...], another for the rest, and both joined.

    The functions return an array or a tuple of them; so does this. One without tokens is not called.
    """
    total = arrays[0].shape[1]
    if plain in (0, total):
        return (understand if plain else generate)(*arrays)
    first = understand(*(a[:, :plain] for a in arrays))
    rest = generate(*(a[:, plain:] for a in arrays))
    if isinstance(first, tuple):
        return tuple(mx.concatenate(list(pair), 1) for pair in zip(first, rest, strict=True))
    return mx.concatenate([first, rest], 1)
