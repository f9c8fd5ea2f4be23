"""How far two sets of pictures are apart, by their features (numpy, float64).

Two figures. The Frechet distance compares the Gaussians fitted to the sets; it is biased upwards, the more the
smaller the sets, so it compares only sets of equal sizes. The kernel distance has no such bias.

Intervals come from random halves of the sets, drawn without replacement. Half of a set without repetition
varies around the whole as much as the whole varies around the population, for figures that are averages over
the set, and nearly so for these two. The usual bootstrap would put the same picture into a sample twice, which
both figures take for likeness that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError

LEVEL = 0.95
HALVES = 200
"""Pairs of random halves behind each interval."""
FIGURES = ("frechet", "kernel")


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to the rows of [N, D] and [M, D].

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)),   covariances A and B (divided by n - 1)

    With centred rows X of A = X^T X and Y of B, tr (A B)^(1/2) is the sum of the singular values of X Y^T,
    the roots of the eigenvalues of a symmetric matrix; so fewer rows than dimensions are no trouble. Raises
    UserError below two rows in either set.
    """
    mean_a, x = _centred(a)
    mean_b, y = _centred(b)
    spread = (x * x).sum() + (y * y).sum()
    if len(x) > len(y):
        x, y = y, x
    if len(x) > x.shape[1]:
        x = np.asarray(np.linalg.qr(x, mode="r"))  # the same X^T X in fewer rows
    cross = x @ y.T
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(cross @ cross.T), 0))
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread - 2 * roots.sum()))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of [N, D] and [M, D] (arXiv 1801.01401, section 4).

    The kernel is (x . y / D + 1)^3. It can be negative: its mean is 0 for two sets of one distribution. Raises
    UserError below two rows in either set.
    """
    return Kernels(a, b).distance()


class Kernels:
    """The kernel distance of two sets and of any parts of them, from kernels computed once."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        """a: [N, D], b: [M, D]. Raises UserError below two rows in either set."""
        a, b = _rows(a), _rows(b)
        self._aa, self._bb, self._ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
        np.fill_diagonal(self._aa, 0)  # a picture's likeness to itself is what makes the plain mean biased
        np.fill_diagonal(self._bb, 0)

    def distance(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> float:
        """The distance of a[rows] and b[columns] (different indices; all of them by default)."""
        u, n = _chosen(rows, len(self._aa))
        v, m = _chosen(columns, len(self._bb))
        within = u @ self._aa @ u / (n * (n - 1)) + v @ self._bb @ v / (m * (m - 1))
        return float(within - 2 * (u @ self._ab @ v) / (n * m))


def halves(n: int, m: int, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of random halves of 0..n-1 and of 0..m-1, without repetition. int [n/2], [m/2]"""
    for i in range(count):
        yield (
            noise.permutation(seed, i, n, "evaluation/halves")[: n // 2],
            noise.permutation(seed, i, m, "evaluation/halves of references")[: m // 2],
        )


def compare_sets(
    sets: Sequence[np.ndarray],
    references: np.ndarray,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    count: int = HALVES,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Both distances of one or two sets of features [Q, D] from the references [R, D], with 95% intervals.

    Row q of every set belongs to the same caption: halves take the same rows of both. Returns figures of each
    set, and the ratios of the first to the second (None without a second; a ratio itself is None where a
    figure is not positive).
    """
    kernels = [Kernels(s, references) for s in sets]
    whole = np.array([[frechet(s, references), k.distance()] for s, k in zip(sets, kernels, strict=True)])
    parts = np.zeros((count, len(sets), 2))
    for i, (rows, columns) in enumerate(halves(len(sets[0]), len(references), count, seed)):
        for j, (s, k) in enumerate(zip(sets, kernels, strict=True)):
            parts[i, j] = frechet(s[rows], references[columns]), k.distance(rows, columns)
        progress(i + 1, count)
    figures = [
        {
            name: {
                "value": float(whole[j, f]),
                "interval": list(half_interval(float(whole[j, f]), parts[:, j, f])),
            }
            for f, name in enumerate(FIGURES)
        }
        for j in range(len(sets))
    ]
    if len(sets) < 2:
        return figures, None
    ratio: dict[str, Any] = {}
    for f, name in enumerate(FIGURES):
        over, under = (float(value) for value in whole[:, f])
        interval = half_ratio_interval(over, under, parts[:, :, f])
        ratio[name] = {"value": over / under, "interval": list(interval)} if interval is not None else None
    return figures, ratio


def half_interval(value: float, of_halves: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Interval around a figure of whole sets from the same figure of random halves [S].

    Halves have their own bias, so only their spread around their mean counts.
    """
    low, high = np.quantile(of_halves - of_halves.mean(), [(1 - level) / 2, (1 + level) / 2])
    return value - float(high), value - float(low)


def half_ratio_interval(
    over: float, under: float, of_halves: np.ndarray, level: float = LEVEL
) -> tuple[float, float] | None:
    """Interval of over / under from [S, 2] such pairs of halves, in logarithms.

    None when any figure is not positive, as a kernel distance near 0 may be: then a ratio means nothing.
    """
    if over <= 0 or under <= 0 or (of_halves <= 0).any():
        return None
    logs = np.log(of_halves[:, 0] / of_halves[:, 1])
    low, high = half_interval(float(np.log(over / under)), logs, level)
    return float(np.exp(low)), float(np.exp(high))


def _rows(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or len(x) < 2:
        raise UserError(
            f"a distance needs two or more feature vectors in each set, got shape {list(x.shape)}"
        )
    return x.astype(np.float64)


def _centred(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D], and rows [N, D] whose X^T X is the covariance."""
    x = _rows(x)
    mean = x.mean(0)
    return mean, (x - mean) / np.sqrt(len(x) - 1)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _chosen(rows: np.ndarray | None, total: int) -> tuple[np.ndarray, int]:
    """1 for chosen rows, 0 for the others, and how many are chosen."""
    if rows is None:
        return np.ones(total), total
    out = np.zeros(total)
    out[rows] = 1
    return out, len(rows)
