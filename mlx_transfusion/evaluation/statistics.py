"""How far a measured figure can be trusted: bootstrap intervals."""

from __future__ import annotations

import numpy as np

from mlx_transfusion import noise

CHUNK = 100
"""Resamples drawn at once."""


def bootstrap_interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of sum(values) / sum(weights), the Q items drawn again with replacement.

    values: [Q], e.g. right or wrong, or the summed loss of a text; weights: [Q], e.g. its number of tokens (1
    each by default, which makes it the interval of the mean). The same seed gives the same interval.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to take an interval of")
    weights = np.ones(n) if weights is None else weights
    ratios = []
    for start in range(0, samples, CHUNK):  # a bounded share of the draws in memory at once
        shape = (min(CHUNK, samples - start), n)
        chosen = noise.integers(seed, start // CHUNK, n, shape, "evaluation/bootstrap")
        ratios.append(values[chosen].sum(1) / weights[chosen].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
