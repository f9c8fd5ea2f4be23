"""The layers of transfusion-pytorch (lucidrains.py): attention, feed-forward, and what ties them together.

Text passes a layer behind a norm with a learned gain; a modality's tokens pass it with gain, shift and output gate
that the time makes (DiT's adaLN-zero, arXiv 2212.09748). A pass holds one kind alone, so nothing here selects.
Shapes: B rows, T positions, S cached positions, D width, H heads, E head width, M one time for all T, or T.
"""

from __future__ import annotations

from math import pi

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.gates import silu
from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig

NO_NORM = 1e-24
"""Below any square of a vector that is not zero: the package normalises by the length alone."""


class UnitNorm(nn.Module):
    """RMSNorm whose gain is one more than its parameter."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma = mx.zeros((d,))

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] -> [..., D]."""
        return mx.fast.rms_norm(x, self.gamma + 1, NO_NORM)


class TimeEmbedding(nn.Module):
    """Times in [0, 1] as learned waves, then one layer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.frequencies = mx.random.normal((d // 2,))
        self.linear = nn.Linear(d + 1, 4 * d)

    def __call__(self, times: mx.array) -> mx.array:
        """[B] -> [B, 1, 4D]."""
        times = times[:, None, None]
        waves = times * self.frequencies * (2 * pi)
        x = mx.concatenate([times, mx.sin(waves), mx.cos(waves)], -1)
        return silu(self.linear(x.astype(self.linear.weight.dtype)))


class Conditioned(nn.Module):
    """What text and modality share around a layer: norms in front, gains behind."""

    def __init__(self, layer: nn.Module, d: int) -> None:
        super().__init__()
        self.layer = layer
        self.gain = mx.zeros((d,))
        self.layerscale = mx.zeros((d,))
        self.film = nn.Linear(4 * d, 2 * d)
        self.gate = nn.Linear(4 * d, d)

    def enter(self, x: mx.array, time: mx.array | None) -> mx.array:
        """Hidden states [B, T, D] as the layer takes them; time [B, M, 4D] of a modality, None of text."""
        x = mx.fast.layer_norm(x, None, None, 1e-5)
        if time is None:
            return x * (self.gain + 1)
        gamma, beta = mx.split(self.film(time), 2, -1)
        return x * (gamma + 1) + beta

    def leave(self, out: mx.array, time: mx.array | None) -> mx.array:
        """The layer's output [B, T, D], ready to be added."""
        return out * (self.layerscale + 1) if time is None else out * mx.sigmoid(self.gate(time))


class Attention(nn.Module):
    """Attention with normed queries and keys, capped scores and gated heads, by config."""

    def __init__(self, config: LucidrainsConfig, first: bool) -> None:
        super().__init__()
        self._config = config
        d, inner = config.dim, config.heads * config.dim_head
        self.to_qk = nn.Linear(d, 2 * inner, bias=False)
        self.to_v = nn.Linear(d, inner, bias=False)
        self.to_out = nn.Linear(inner, d, bias=False)
        self.q_norm = UnitNorm(config.dim_head)
        self.k_norm = UnitNorm(config.dim_head)
        if config.gates:
            self.to_gates = nn.Linear(d, config.heads, bias=False)
        if config.value_residual and not first:
            self.value_mix = nn.Linear(d, config.heads)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None,
        rotary: mx.array | None,
        past: KeysValues | None,
        first_values: mx.array | None,
    ) -> tuple[mx.array, KeysValues, mx.array]:
        """Attend from x [B, T, D] to `past` and itself.

        rotary: radians [B, 1, T, E/2], None without positions. first_values [B, H, T, E]: of the first layer.
        Returns the output [B, T, D], the new keys and values, and the values before they are mixed.
        """
        c = self._config
        q, k = (self._heads(part) for part in mx.split(self.to_qk(x), 2, -1))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        own = v = self._heads(self.to_v(x))
        if first_values is not None:
            mix = mx.sigmoid(self.value_mix(x)).transpose(0, 2, 1)[..., None]
            v = v * mix + first_values * (1 - mix)
        if rotary is not None:
            q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
        keys, values = k, v
        if past is not None:
            keys, values = mx.concatenate([past[0], k], 2), mx.concatenate([past[1], v], 2)
        out = self._attend(q, keys, values, mask)
        if c.gates:
            out = out * mx.sigmoid(self.to_gates(x)).transpose(0, 2, 1)[..., None]
        return self.to_out(out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)), (k, v), own

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        """Written out, because no fused attention caps its scores."""
        c = self._config
        scores = (q * c.dim_head**-0.5) @ k.swapaxes(-1, -2)
        scores = c.softcap * mx.tanh(scores / c.softcap)
        if mask is not None:
            scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        weights = mx.softmax(scores, -1, precise=True)
        if not c.laser:
            return weights @ v
        capped = c.laser_softcap * mx.tanh(v / c.laser_softcap)
        return mx.log(mx.maximum(weights @ mx.exp(capped), 1e-20))

    def _heads(self, x: mx.array) -> mx.array:
        """[B, T, H*E] -> [B, H, T, E]."""
        return x.reshape(*x.shape[:2], self._config.heads, -1).transpose(0, 2, 1, 3)


def rotate_pairs(x: mx.array, rotary: mx.array) -> mx.array:
    """Rotate neighbouring pairs of x [B, H, T, E] by radians [B, 1, T, E/2]."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = mx.cos(rotary).astype(x.dtype), mx.sin(rotary).astype(x.dtype)
    return mx.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


class FeedForward(nn.Module):
    """Gated by an exact GELU: the second half of the inner numbers opens the first."""

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, 2 * config.ff_inner)
        self.down = nn.Linear(config.ff_inner, config.dim)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, D] -> [B, T, D]."""
        values, gates = mx.split(self.up(x), 2, -1)
        return self.down(values * gates * (1 + mx.erf(gates * 0.5**0.5)) / 2)


class DepthAttention(nn.Module):
    """A learned query that mixes the outputs of all layers so far, token by token."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = 0.02 * mx.random.normal((d,))
        self.norm = UnitNorm(d)

    def __call__(self, states: list[mx.array]) -> mx.array:
        """L arrays [B, T, D] -> [B, T, D]."""
        values = mx.stack(states)
        scores = (self.norm(values) @ self.query) * self.query.shape[0] ** -0.5
        return (mx.softmax(scores, 0, precise=True)[..., None] * values).sum(0)


class AxialPositions(nn.Module):
    """One small network for each axis makes a vector of an index; their sum is a token's position."""

    def __init__(self, d: int, axes: int) -> None:
        super().__init__()
        self.axes = [AxisNetwork(d) for _ in range(axes)]

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        """Tokens along each axis -> [N, D] in raster order."""
        total = mx.zeros(())
        for i, (n, network) in enumerate(zip(shape, self.axes, strict=True)):
            vectors = network(mx.arange(n))
            total = total + vectors.reshape(*(n if j == i else 1 for j in range(len(shape))), -1)
        return total.reshape(-1, total.shape[-1])


class AxisNetwork(nn.Module):
    """Three linear layers with SiLU between them."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, 2 * d)
        self.fc2 = nn.Linear(2 * d, 2 * d)
        self.fc3 = nn.Linear(2 * d, d)

    def __call__(self, index: mx.array) -> mx.array:
        """[n] -> [n, D]."""
        x = index.astype(self.fc1.weight.dtype)[:, None]
        return self.fc3(silu(self.fc2(silu(self.fc1(x)))))


class Layer(nn.Module):
    """One layer: perhaps a skip from the first half, attention, feed-forward, the mixture of depths."""

    def __init__(self, config: LucidrainsConfig, index: int) -> None:
        super().__init__()
        d = config.dim
        if config.unet_skips and index >= config.depth / 2:
            self.skip = nn.Linear(2 * d, d, bias=False)
        self.attention = Conditioned(Attention(config, index == 0), d)
        self.feed_forward = Conditioned(FeedForward(config), d)
        self.mixture = DepthAttention(d)


class Modality(nn.Module):
    """From latents to token vectors and back."""

    def __init__(self, config: LucidrainsConfig, kind: int) -> None:
        super().__init__()
        c = config.modalities[kind]
        if c.dim_latent != config.dim:
            self.enter = nn.Linear(c.dim_latent, config.dim)
        self.leave = nn.Linear(config.dim, c.dim_latent, bias=False)
        if c.axial_positions:
            self.positions = AxialPositions(config.dim, c.axes or 0)
