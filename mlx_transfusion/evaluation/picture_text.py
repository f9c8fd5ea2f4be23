"""Do painted pictures say what their captions say, as CLIP sees both? Cosines and retrieval (numpy only).

The score of a pair is that of CLIPScore (arXiv 2104.08718, section 3): 2.5 times the cosine, not below 0, without the
words "A photo depicts" in front of the caption. Retrieval looks for each picture's caption among all captions of the
set, and for each caption's picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_transfusion.evaluation.statistics import bootstrap_interval

WEIGHT = 2.5
DEPTHS = (1, 5, 10)
"""R@k: the right one is among the k nearest."""


def picture_text(
    pictures: np.ndarray, texts: np.ndarray, captions: Sequence[str], seed: int
) -> dict[str, Any]:
    """Figures of Q pictures [Q, P] and their captions' vectors [Q, P]; row q of both belongs together.

    Equal captions are one: a picture of either is right for both.
    """
    cosine = _unit(pictures) @ _unit(texts).T
    own = np.diagonal(cosine)
    same = np.array([[a == b for b in captions] for a in captions])
    score = WEIGHT * np.maximum(own, 0)
    return {
        "count": len(captions),
        "mean_cosine": float(own.mean()),
        "clip_score": float(score.mean()),
        "clip_score_interval": list(bootstrap_interval(score, seed=seed)),
        "text_of_picture": recalls(cosine, same),
        "picture_of_text": recalls(cosine.T, same),
    }


def recalls(likeness: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """R@k of each k of DEPTHS that the set is larger than: {"1": ...}.

    likeness: of queries (rows) and candidates [Q, Q], the right one on the diagonal; same: bool [Q, Q], candidates as
    right as that. The place of the right one counts the others that are nearer, and half of those equally near.
    """
    best = np.where(same, likeness, -np.inf).max(1, keepdims=True)
    nearer, equal = ((test & ~same).sum(1) for test in (likeness > best, likeness == best))
    place = 1 + nearer + equal / 2
    return {str(k): float((place <= k).mean()) for k in DEPTHS if k == 1 or k < len(likeness)}


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)
