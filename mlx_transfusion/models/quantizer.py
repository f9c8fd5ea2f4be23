"""Vector quantisation: each element becomes the nearest vector of a codebook (arXiv 1711.00937).

The paper's twin of its KL autoencoder for the discrete baseline (arXiv 2408.11039, section 4.2): codebook loss 1,
commitment 0.25. The codebook is learned by its loss, or follows running means of what is assigned to each code
(appendix A.1 of 1711.00937). Codes that nothing is assigned to any more are revived from the batch.
Shapes: N elements of C channels, K codes.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

EPS = 1e-5
"""Count that each code has in advance when running sums become means (Laplace smoothing)."""


class Quantized(NamedTuple):
    """Elements by their codes, and what training needs of them."""

    values: mx.array
    """[..., C], the code's vector; its gradient goes straight to the element (straight-through estimator)."""
    codes: mx.array
    """int32 [...]."""
    codebook_loss: mx.array
    """Mean of (sg[z] - e)^2: pulls codes to elements."""
    commitment: mx.array
    """Mean of (z - sg[e])^2: pulls elements to codes."""


class VectorQuantizer(nn.Module):
    """A codebook."""

    def __init__(self, size: int, channels: int) -> None:
        """size: K codes of C channels."""
        super().__init__()
        self.codebook = mx.random.uniform(-1 / size, 1 / size, (size, channels))

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.codebook.shape[0]

    def codes(self, z: mx.array) -> mx.array:
        """Elements [..., C] -> int32 [...]: the nearest codes by Euclidean distance, of equal ones the first."""
        return nearest(z.reshape(-1, z.shape[-1]), self.codebook).reshape(z.shape[:-1])

    def vectors(self, codes: mx.array) -> mx.array:
        """Codes [...] -> [..., C]."""
        return self.codebook[codes]

    def __call__(self, z: mx.array) -> Quantized:
        """Elements [..., C], quantised."""
        codes = self.codes(z)
        vectors = self.vectors(codes)
        fixed = mx.stop_gradient(vectors)
        return Quantized(
            z + mx.stop_gradient(vectors - z),
            codes,
            (mx.stop_gradient(z) - vectors).square().mean(),
            (z - fixed).square().mean(),
        )


def nearest(z: mx.array, codebook: mx.array) -> mx.array:
    """Elements [N, C], codebook [K, C] -> int32 [N], without a gradient; of codes as near the first."""
    # |z - e|^2 without |z|^2, which is the same for all codes.
    distance = codebook.square().sum(-1) - 2 * (z @ codebook.T)
    return mx.stop_gradient(distance.argmin(-1).astype(mx.int32))


class Usage(NamedTuple):
    """Running sums over what is assigned to each code."""

    counts: mx.array
    """[K], elements a batch."""
    sums: mx.array
    """[K, C]."""

    @property
    def perplexity(self) -> mx.array:
        """exp of the entropy of the codes' shares: K when all are used alike, 1 when one is."""
        share = self.counts / self.counts.sum()
        return mx.exp(-(share * mx.log(mx.maximum(share, 1e-10))).sum())

    @property
    def means(self) -> mx.array:
        """[K, C]: what an EMA codebook holds, sums over counts that are smoothed and keep their total."""
        total = self.counts.sum()
        smoothed = (self.counts + EPS) / (total + EPS * len(self.counts)) * total
        return self.sums / smoothed[:, None]


def even_usage(codebook: mx.array, elements: int) -> Usage:
    """Where running sums start: every code has an even part of a batch's elements, and its own vector as mean."""
    counts = mx.full((len(codebook),), elements / len(codebook))
    return Usage(counts, codebook * counts[:, None])


def update_usage(usage: Usage, z: mx.array, codes: mx.array, decay: float) -> Usage:
    """usage <- decay usage + (1 - decay) batch, for elements z [N, C] and their codes [N]."""
    assigned = (codes[:, None] == mx.arange(len(usage.counts))).astype(z.dtype)
    return Usage(
        decay * usage.counts + (1 - decay) * assigned.sum(0),
        decay * usage.sums + (1 - decay) * (assigned.T @ z),
    )


def revive(
    codebook: mx.array, usage: Usage, z: mx.array, chosen: mx.array, threshold: float
) -> tuple[mx.array, Usage, mx.array]:
    """Move codes that are used less than `threshold` of an even use to elements of the batch.

    z [N, C]; chosen int [K]: which element each code would go to. Gives codebook, usage (an even use for those
    that were moved, so that they have time to win elements), and which were moved, bool [K].
    """
    fresh = even_usage(z[chosen], len(z))
    dead = usage.counts < threshold * len(z) / len(codebook)
    column = dead[:, None]
    return (
        mx.where(column, z[chosen], codebook),
        Usage(mx.where(dead, fresh.counts, usage.counts), mx.where(column, fresh.sums, usage.sums)),
        dead,
    )
