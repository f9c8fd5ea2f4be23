"""Encoding and decoding of large pictures, tile by tile, in memory that does not grow with the picture.

Convolutions are local, so a tile with a margin as wide as they reach has the right numbers in its core. Two things
are not local: group normalisation needs the mean and variance of the whole picture, attention its keys and values.
Both are measured first, on small windows from all over the picture that pass the network side by side and are
normalised together, and then given to every tile alike (a `Scope`). So there are no seams: each element is the same
function of its surroundings whatever tile it lies in. Where one batch of windows covers the picture, the result is
that of `encode` and `decode`; a larger picture differs from it as far as its windows differ from the whole of it,
which is a slight drift of contrast and colour.

Arrays outside the tiles are numpy's: MLX holds one tile, or one batch of windows, at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import MAX_LOGVAR, MIN_LOGVAR, Autoencoder, AutoencoderKL
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.autoencoder_parts import Attention, Scope, attention


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut, and how much of it is measured before. All in latent elements."""

    tile: int = 64
    """Along one side of a tile, without its margin."""
    window: int = 16
    """Along one side of a window that is measured, without its margin."""
    batches: int = 4
    """At most so many batches of windows, each of about the size of a tile."""
    max_keys: int = 4096
    """Elements that attention looks at."""

    def __post_init__(self) -> None:
        for name in ("tile", "window", "batches", "max_keys"):
            if getattr(self, name) < 1:
                raise UserError(f"tiling: {name} is {getattr(self, name)}, expected 1 or more")


def decode_tiled(model: Autoencoder, z: np.ndarray, tiling: Tiling = Tiling()) -> np.ndarray:
    """As `Autoencoder.decode`: latents z [B, h, w, C], not normalised -> pixels float32 [B, H, W, 3].

    A picture of one tile is decoded whole. Raises UserError for latents of another number of channels.
    """
    model.check_latents(z.shape)
    margin = decoder_reach(model.config)
    return np.stack([_one(model.decode, picture, tiling, margin, 1, model.config.factor) for picture in z])


def encode_tiled(
    model: AutoencoderKL, pixels: np.ndarray, tiling: Tiling = Tiling()
) -> tuple[np.ndarray, np.ndarray]:
    """As `AutoencoderKL.encode`: pixels [B, H, W, 3] in [-1, 1] -> mean and logvar float32 [B, h, w, C].

    Raises UserError as `encoded_tiled`.
    """
    mean, logvar = np.split(encoded_tiled(model, pixels, tiling), 2, -1)
    return mean, np.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)


def encoded_tiled(model: Autoencoder, pixels: np.ndarray, tiling: Tiling = Tiling()) -> np.ndarray:
    """As `Autoencoder.encoded`: pixels [B, H, W, 3] in [-1, 1] -> float32 [B, h, w, encoder_channels].

    Raises UserError for a size that the halvings do not divide, and for another number of channels.
    """
    model.check_pixels(pixels.shape)
    margin, factor = encoder_reach(model.config), model.config.factor
    return np.stack([_one(model.encoded, picture, tiling, margin, factor, 1) for picture in pixels])


def decoder_reach(config: AutoencoderConfig) -> int:
    """Latent elements, on each side, that a decoded pixel depends on through convolutions (bounded from above)."""
    reach = 1.0 + 4  # the first convolution and the middle
    for level in range(len(config.block_out_channels)):
        last = level == len(config.block_out_channels) - 1
        reach += 2 * (config.layers_per_block + 1) / 2**level
        reach += 1 / 2**level if last else 1 / 2 ** (level + 1)
    return math.ceil(reach) + 1  # doubling rounds to whole elements


def encoder_reach(config: AutoencoderConfig) -> int:
    """Latent elements, on each side, whose pixels an element depends on through convolutions (bounded from above)."""
    levels = len(config.block_out_channels)
    reach = 4.0 + 1 + 1 / 2 ** (levels - 1)  # the middle, the last convolution and the first
    for level in range(levels):
        size = 2 ** (levels - 1 - level)
        reach += (2 * config.layers_per_block + 2 * (level < levels - 1)) / size
    return math.ceil(reach) + 1


# ---- one picture ----

Run = Callable[[mx.array, Scope], mx.array]


@dataclass(frozen=True)
class _Place:
    """A part of the picture: its rows and columns, and those of the window around it that are computed."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    outer_rows: tuple[int, int]
    outer_columns: tuple[int, int]

    def core(self, x: mx.array) -> mx.array:
        """The part itself, of an array [H, W, C] of the window at any resolution."""
        height = x.shape[0] // (self.outer_rows[1] - self.outer_rows[0])
        width = x.shape[1] // (self.outer_columns[1] - self.outer_columns[0])
        top, left = self.rows[0] - self.outer_rows[0], self.columns[0] - self.outer_columns[0]
        bottom, right = self.rows[1] - self.outer_rows[0], self.columns[1] - self.outer_columns[0]
        return x[top * height : bottom * height, left * width : right * width]

    def window(self, picture: np.ndarray, scale: int) -> np.ndarray:
        """The window of a picture [H, W, C] with `scale` elements for one of the latent."""
        (top, bottom), (left, right) = self.outer_rows, self.outer_columns
        return picture[top * scale : bottom * scale, left * scale : right * scale]


def _one(
    run: Run, picture: np.ndarray, tiling: Tiling, margin: int, input_scale: int, output_scale: int
) -> np.ndarray:
    """Run over the tiles of one picture [H, W, C]; scales: elements of input and output for one of the latent."""
    size = picture.shape[0] // input_scale, picture.shape[1] // input_scale
    places = list(_places(size, tiling.tile, margin))
    scope = Scope()
    if len(places) > 1:
        scope = _measure(run, picture, tiling, margin, input_scale)
    out: np.ndarray | None = None
    for place in places:
        x = mx.array(place.window(picture, input_scale)[None]).astype(mx.float32)
        core = np.array(place.core(run(x, scope)[0]).astype(mx.float32))
        if out is None:
            out = np.empty((size[0] * output_scale, size[1] * output_scale, core.shape[-1]), np.float32)
        (top, bottom), (left, right) = place.rows, place.columns
        s = output_scale
        out[top * s : bottom * s, left * s : right * s] = core
        mx.clear_cache()  # the last tiles of a row have another size: freed memory of this one would pile up
    assert out is not None
    return out


def _places(size: tuple[int, int], side: int, margin: int) -> Iterator[_Place]:
    """Parts of at most side x side that cover the picture; all windows have one size and lie inside of it."""
    height, width = (min(n, side + 2 * margin) for n in size)
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            y = min(max(0, top - margin), size[0] - height)
            x = min(max(0, left - margin), size[1] - width)
            yield _Place(
                (top, min(top + side, size[0])),
                (left, min(left + side, size[1])),
                (y, y + height),
                (x, x + width),
            )


# ---- what all tiles share ----


def _measure(run: Run, picture: np.ndarray, tiling: Tiling, margin: int, scale: int) -> _Shared:
    """Statistics, keys and values of a picture from batches of its windows, drawn at random but always the same."""
    size = picture.shape[0] // scale, picture.shape[1] // scale
    # A margin half as wide as the window will do here: what it gets wrong is little, and more windows fit.
    places = list(_places(size, tiling.window, min(margin, tiling.window // 2)))
    area = math.prod(places[0].window(picture, scale).shape[:2]) // scale**2
    together = max(1, (tiling.tile + 2 * margin) ** 2 // area)
    order = noise.permutation(0, 0, len(places), "autoencoder/windows")
    shared = _Shared(tiling.max_keys)
    for first in range(0, min(len(places), together * tiling.batches), together):
        chosen = [places[i] for i in order[first : first + together]]
        sample = _Sample(chosen)
        x = mx.array(np.stack([place.window(picture, scale) for place in chosen])).astype(mx.float32)
        run(x, sample)
        shared.add(sample)
    return shared


class _Sample(Scope):
    """Windows that are normalised together, and look at each other, by what lies in their cores."""

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places
        self.norms: dict[int, tuple[int, mx.array, mx.array]] = {}
        """Of each layer, by its identity: count of numbers, mean and variance of each group [G]."""
        self.keys: dict[int, tuple[mx.array, mx.array]] = {}
        """[N, C] each."""

    def normalize(self, norm: nn.GroupNorm, x: mx.array) -> mx.array:
        cores = self._cores(x)
        groups = cores.reshape(cores.shape[0], norm.num_groups, -1).astype(mx.float32)
        mean, var = groups.mean((0, 2)), groups.var((0, 2))
        self.norms[id(norm)] = groups.shape[0] * groups.shape[2], mean, var
        return _normalize(norm, x, mean, var)

    def attend(self, layer: Attention, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        self.keys[id(layer)] = keys, values = self._cores(k), self._cores(v)
        return attention(q.reshape(1, -1, *q.shape[2:]), keys[None], values[None]).reshape(q.shape)

    def _cores(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [N, C]."""
        return mx.concatenate(
            [place.core(x[i]).reshape(-1, x.shape[-1]) for i, place in enumerate(self._places)]
        )


class _Shared(Scope):
    """What every tile is given: the statistics of all samples, and a part of their keys and values."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._sums: dict[int, _Sum] = {}
        self._parts: dict[int, list[tuple[mx.array, mx.array]]] = {}

    def add(self, sample: _Sample) -> None:
        """Compute what one sample has seen, and let go of the rest."""
        mx.eval(sample.norms, sample.keys)
        for layer, (count, mean, var) in sample.norms.items():
            numbers = np.array(mean).astype(np.float64), np.array(var).astype(np.float64)
            self._sums.setdefault(layer, _Sum()).add(count, *numbers)
        for layer, pair in sample.keys.items():
            self._parts.setdefault(layer, []).append(pair)
        sample.norms, sample.keys = {}, {}
        mx.clear_cache()

    def normalize(self, norm: nn.GroupNorm, x: mx.array) -> mx.array:
        s = self._sums[id(norm)]
        return _normalize(norm, x, mx.array(np.asarray(s.mean)), mx.array(np.asarray(s.spread) / s.count))

    def attend(self, layer: Attention, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        parts = self._parts[id(layer)]
        if len(parts) > 1 or parts[0][0].shape[0] > self._max_keys:
            whole = [mx.concatenate([part[i] for part in parts]) for i in range(2)]
            step = -(-whole[0].shape[0] // self._max_keys)
            parts[:] = [(mx.contiguous(whole[0][::step]), mx.contiguous(whole[1][::step]))]
            mx.eval(parts)
        keys, values = parts[0]
        return attention(q, keys[None], values[None])


@dataclass
class _Sum:
    """Mean and variance of each group, gathered from parts (Chan et al. 1983), float64."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    spread: np.ndarray | float = 0.0
    """Summed squares around the mean."""

    def add(self, count: int, mean: np.ndarray, var: np.ndarray) -> None:
        total = self.count + count
        difference = mean - self.mean
        self.spread = self.spread + var * count + difference**2 * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total


def _normalize(norm: nn.GroupNorm, x: mx.array, mean: mx.array, var: mx.array) -> mx.array:
    """x [B, H, W, C] by the mean and variance of each group [G]."""
    width = x.shape[-1] // norm.num_groups
    gain = mx.repeat(mx.rsqrt(var + norm.eps), width) * norm.weight
    shift = norm.bias - mx.repeat(mean, width) * gain
    return x * gain.astype(x.dtype) + shift.astype(x.dtype)
