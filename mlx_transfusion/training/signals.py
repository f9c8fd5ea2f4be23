"""What consistency training is watched by: its loss alone says neither that it works nor that it fails.

F - sg(F) is always 0, so the loss only mirrors the length of the rescaled tangent. Progress and trouble show in the
raw tangent and its parts, by angle, in the gradient's norm, and in pictures (sCM, arXiv 2410.11081, section 4).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

BUCKETS = 8
"""Equal parts of [0, pi/2] that the signals are averaged in."""
NAMES = ("tangent", "drift", "derivative", "loss", "log_weight")
"""Of each picture: RMS of the raw tangent, of its parts cos(a)^2 (F - v) and J, its loss and w(a)."""


class Signals:
    """Collects the watched values of every picture between two lines of the metrics."""

    def __init__(self) -> None:
        self._angles: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, weight: np.ndarray, angle: np.ndarray, seen: mx.array) -> None:
        """Note one part of a step: weight [M] (0 for padding), angle [M], seen [5, M] in the order of NAMES."""
        real = weight > 0
        self._angles.append(angle[real])
        self._values.append(np.array(seen)[:, real])

    def tangent(self) -> float:
        """Median RMS of the raw tangent in the newest part; 0 without a picture."""
        newest = self._values[-1][0] if self._values else np.zeros(0)
        return float(np.median(newest)) if newest.size else 0.0

    def collect(self) -> dict[str, float]:
        """Means by angle, e.g. `tangent/0.20-0.39`, and the worst tangent over the median; starts afresh."""
        if not self._values:
            return {}
        angle, values = np.concatenate(self._angles), np.concatenate(self._values, 1)
        self._angles, self._values = [], []
        edges = np.linspace(0, math.pi / 2, BUCKETS + 1)
        place = np.clip(np.digitize(angle, edges) - 1, 0, BUCKETS - 1)
        out: dict[str, float] = {}
        for b in range(BUCKETS):
            inside = place == b
            if inside.any():
                for name, row in zip(NAMES, values, strict=True):
                    out[f"{name}/{edges[b]:.2f}-{edges[b + 1]:.2f}"] = float(row[inside].mean())
        if values.size:
            out["tangent_worst"] = float(values[0].max() / max(float(np.median(values[0])), 1e-12))
        return out


class Watch:
    """Tells when a signal leaves its usual range, and which one left it first.

    A signal is out of range when it exceeds FACTOR times the median of its last WINDOW values, or is not finite.
    """

    FACTOR, WINDOW, PATIENCE = 50.0, 200, 20

    def __init__(self) -> None:
        self._past: dict[str, deque[float]] = {}
        self._since: dict[str, int] = {}

    @property
    def calm(self) -> bool:
        """Whether every signal is in its range: only then is a checkpoint worth keeping."""
        return not self._since

    def observe(self, step: int, values: Mapping[str, float]) -> str | None:
        """Note the values after `step`. Returns what went wrong once one was out of range for PATIENCE steps."""
        for name, value in values.items():
            past = self._past.setdefault(name, deque(maxlen=self.WINDOW))
            usual = float(np.median(past)) if len(past) >= self.WINDOW // 10 else math.inf
            if math.isfinite(value) and value <= self.FACTOR * max(usual, 1e-6):
                self._since.pop(name, None)
                past.append(value)
            else:
                self._since.setdefault(name, step)
        if not self._since:
            return None
        first, since = min(self._since.items(), key=lambda item: item[1])
        hopeless = not all(map(math.isfinite, values.values()))
        if hopeless or step - since >= self.PATIENCE:
            return f"{first} left its usual range first, at step {since}"
        return None
