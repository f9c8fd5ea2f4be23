"""Means over seeds with 95% bootstrap intervals, and the differences between two variants (numpy only).

A measure of a run is either one number for each item (picture, caption, text) with weights (tokens, or 1), or one
number for the whole set, as a Frechet distance is. Bootstrap samples draw seeds and items again, both with
replacement; two variants share items and seeds, so their difference is taken within each sample. Where a measure has
one number a run, only seeds can be drawn again. Few seeds make intervals too narrow: three seeds have 27 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mlx_transfusion import noise

SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A number with its interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> bool:
        """Whether there is an interval: one number of one run has none."""
        return self.high > self.low


def figure(runs: Sequence[dict[str, Any]]) -> Figure:
    """Mean of a measure over the runs of a variant, one for each seed."""
    return _interval(*_samples(_arrays(runs)))


def difference(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Figure:
    """The same for `runs` minus `others`; the k-th of both have the same seed."""
    a, b = _samples(_arrays(runs)), _samples(_arrays(others))
    return _interval(a[0] - b[0], a[1] - b[1])


def _interval(value: float, samples: np.ndarray) -> Figure:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, float(low), float(high))


def _arrays(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights, [S, Q] each; Q is 1 for a measure of one number a run."""
    values = np.array([r["values"] if "values" in r else [r["value"]] for r in runs], float)
    return values, np.array([r.get("weights", np.ones(values.shape[1])) for r in runs], float)


def _samples(arrays: tuple[np.ndarray, np.ndarray]) -> tuple[float, np.ndarray]:
    """The figure, and that of every bootstrap sample [SAMPLES]. The draws depend on the shape alone."""
    values, weights = arrays
    seeds, items = values.shape
    s, q = _counts(0, seeds, "comparisons/seeds"), _counts(1, items, "comparisons/items")
    drawn = ((s @ (values * weights)) * q).sum(1) / ((s @ weights) * q).sum(1)
    return float((values * weights).sum() / weights.sum()), drawn


@cache
def _counts(stream: int, total: int, name: str) -> np.ndarray:
    """How often each of 0..total-1 is drawn, in every sample: float [SAMPLES, total]."""
    draws = noise.integers(0, stream, total, (SAMPLES, total), name)
    out = np.zeros((SAMPLES, total))
    np.add.at(out, (np.arange(SAMPLES)[:, None], draws), 1.0)
    return out
