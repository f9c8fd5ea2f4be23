"""Power laws through measures at several training budgets, and how much less one model needs (numpy only).

Section 4.2 of arXiv 2408.11039 fits a line to log performance over log operations for either model and reports the
"parity FLOP ratio": the operations at which Transfusion reaches the baseline's best figure, over those the baseline
took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError

SAMPLES = 2000


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x ** exponent."""

    factor: float
    exponent: float
    r_squared: float
    """Share of the variance of log y that the line explains."""

    def at(self, x: float) -> float:
        """y at x."""
        return float(self.factor * x**self.exponent)

    def inverse(self, y: float) -> float:
        """The x that gives y; infinite beyond all numbers. Raises UserError for a law that is flat."""
        if self.exponent == 0:
            raise UserError("a power law with exponent 0 reaches one value only: it has no inverse")
        try:
            return float((y / self.factor) ** (1 / self.exponent))
        except OverflowError:
            return math.inf


def fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms. Raises UserError below two different x, and for numbers that are not positive."""
    a, b = np.array(x, float), np.array(y, float)
    if len(np.unique(a)) < 2 or not (a > 0).all() or not (b > 0).all():
        raise UserError("a power law needs positive values at two or more different budgets")
    u, v = np.log(a), np.log(b)
    centred = u - u.mean()
    slope = float(centred @ v / (centred @ centred))
    left = v - v.mean() - slope * centred
    spread = float(((v - v.mean()) ** 2).sum())
    return PowerLaw(
        float(np.exp(v.mean() - slope * u.mean())), slope, 1 - float(left @ left) / spread if spread else 1.0
    )


def parity_ratio(
    ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]
) -> float:
    """Operations at which our law reaches what theirs gives at their largest budget, over that budget.

    Each is (budgets, values), the lower the better. Below 1: we need less; infinite: our values do not fall with the
    budget, so no budget is enough. Raises UserError as `fit`.
    """
    budget = max(theirs[0])
    return _reached(fit(*ours), fit(*theirs).at(budget)) / budget


def _reached(law: PowerLaw, value: float) -> float:
    """The budget at which a law that falls has come down to `value`; infinite for one that does not fall."""
    return law.inverse(value) if law.exponent < 0 else math.inf


def parity_interval(
    ours: tuple[Sequence[float], Sequence[float]],
    theirs: tuple[Sequence[float], Sequence[float]],
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the ratio: the runs (points) of either model are drawn again with replacement.

    Draws that hold fewer than two budgets are left out.
    """
    found = []
    draws = [
        noise.integers(0, k, len(x), (SAMPLES, len(x)), "comparisons/parity")
        for k, (x, _) in enumerate((ours, theirs))
    ]
    points = [(np.array(x, float), np.array(y, float)) for x, y in (ours, theirs)]
    for sample in range(SAMPLES):
        parts = [(x[rows[sample]], y[rows[sample]]) for (x, y), rows in zip(points, draws, strict=True)]
        if all(len(np.unique(x)) > 1 for x, _ in parts):
            budget = max(theirs[0])
            found.append(_reached(fit(*parts[0]), fit(*parts[1]).at(budget)) / budget)
    found.sort()  # quantiles by rank: between two infinite ones there is nothing to interpolate
    low, high = ((1 - level) / 2, (1 + level) / 2)
    return found[round(low * (len(found) - 1))], found[round(high * (len(found) - 1))]
