"""BAGEL's own sampling: Euler steps of its rectified flow, guided by two contexts, with the norm held back.

An edit knows three contexts: everything, everything but the last text, and the texts without pictures. Guidance
leads away from the second and from the third; since it makes the velocity longer, its norm is then brought back to
that of the unguided one, for the whole picture or token by token.
Shapes: B pictures, N tokens of P numbers. Times run from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.cache import KVCache

if TYPE_CHECKING:
    from mlx_transfusion.models.bagel import Bagel

RENORMS = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class BagelGuidance:
    """Scales of the two guidances, and how the norm is held back."""

    text_scale: float = 4.0
    image_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    """Guidance applies where low < t <= high."""
    renorm: str = "global"
    """"global": the norm of the picture, after both guidances; "channel": of each token, after both;
    "text_channel": of each token, between them."""
    minimum: float = 0.0
    """The norm is never cut to less than this share."""

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise UserError(f'renorm is "{self.renorm}", expected one of {", ".join(RENORMS)}')
        if not 0 <= self.minimum <= 1:
            raise UserError(f"the smallest share of the norm is {self.minimum}: use a number from 0 to 1")

    def active(self, t: float) -> bool:
        """Whether time t needs the other contexts at all. The image scale alone does nothing, as in the original."""
        return self.text_scale > 1 and self.interval[0] < t <= self.interval[1]

    def __call__(self, v: mx.array, without_text: mx.array, without_image: mx.array | None) -> mx.array:
        """The guided velocity of three [B, N, P]; None for the last one where image_scale is 1 or less."""
        out = without_text + self.text_scale * (v - without_text)
        if self.renorm == "text_channel":
            out = self._held_back(out, v, (-1,))
        if without_image is not None and self.image_scale > 1:
            out = without_image + self.image_scale * (out - without_image)
        if self.renorm == "text_channel":
            return out
        return self._held_back(out, v, (1, 2) if self.renorm == "global" else (-1,))

    def _held_back(self, guided: mx.array, v: mx.array, axes: tuple[int, ...]) -> mx.array:
        """`guided`, no longer than `v` along `axes`, but not shortened to less than the minimum."""
        norm, own = (mx.sqrt((x * x).sum(axes, keepdims=True)) for x in (guided, v))
        return guided * mx.clip(own / (norm + 1e-8), self.minimum, 1.0)


class EditContexts(NamedTuple):
    """What an edit compares; `paint_flow` takes the three in this order."""

    full: KVCache
    without_text: KVCache
    without_image: KVCache


def edit_contexts(model: Bagel, pixels: mx.array, ids: Sequence[int]) -> EditContexts:
    """Read a picture [1, H, W, 3] in [0, 1], of the model's `picture_size`, and the tokens of what shall change.

    The official program draws the picture's latents from their distributions; these are the means.
    """
    block = model.image_prefix(ids)
    full = model.new_cache(1)
    model.read_source(pixels, full)
    without_text = full.snapshot()
    model.extend_text(np.array([block]), np.array([len(block)]), full)
    return EditContexts(full, without_text, model.prefill(np.array([block]), np.array([len(block)]))[1])


def flow_times(points: int, shift: float = 3.0) -> list[float]:
    """The official grid: `points` times from 1 to 0, so one step less, moved towards the noise by `shift`.

    Raises UserError for fewer than 2 points and a shift that is not positive.
    """
    if points < 2 or not shift > 0:
        raise UserError(f"{points} points with shift {shift}: use 2 or more points and a shift above 0")
    even = [1 - i / (points - 1) for i in range(points)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def paint_flow(
    model: Bagel,
    noise: mx.array,
    times: Sequence[float],
    context: KVCache,
    without_text: KVCache | None = None,
    without_image: KVCache | None = None,
    guidance: BagelGuidance | None = None,
    grid: tuple[int, int] | None = None,
) -> mx.array:
    """Paint from noise [B, N, P] along `times`, behind B rows of each context, to clean latents [B, N, P].

    without_text: the context that ends before the last text (of a prompt alone: `model.guide([])`);
    without_image: the texts alone, needed only where pictures stand in the context. guidance: None is without,
    and then so is a missing `without_text`. grid: rows and columns of another size of picture than the config's.
    """
    x = noise
    for t, following in pairwise(times):
        at = mx.full((x.shape[0],), t)
        v = model.flow(x, at, context, grid)
        if guidance is not None and without_text is not None and guidance.active(t):
            # Without pictures in the context, leaving them out changes nothing.
            pictures = guidance.image_scale > 1
            third = (
                v if without_image is None else model.flow(x, at, without_image, grid) if pictures else None
            )
            v = guidance(v, model.flow(x, at, without_text, grid), third)
        x = x - (t - following) * v
        mx.eval(x)  # one graph a step, not one for all
    return x
