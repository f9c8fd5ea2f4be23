"""Choosing the next text token from logits: a pure function of the logits and one uniform number.

The order is that of most libraries: repetition penalty, banned tokens, temperature, top-k, top-p, min-p,
draw.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError

HEAD = 1024
"""Tokens that are sorted first for top_p; all of them only where these do not reach p."""


def sample_token(
    logits: Any,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    previous: Iterable[int] = (),
    banned: Iterable[int] = (),
    u: float,
) -> int:
    """The id of the next token.

    `logits` is `[V]`, numpy or MLX, in nats. `temperature` 0 takes the likeliest token (the lowest id of
    equals) and ignores `u`. `top_k` keeps the k likeliest (0 = all), `top_p` the fewest likeliest whose
    probabilities reach p, `min_p` those of at least min_p times the likeliest. `repetition_penalty` above 1
    makes the ids in `previous` less likely, `banned` ids impossible. `u` in [0, 1) picks by the inverse of
    the cumulative distribution in order of ids. Raises UserError for a value out of range, logits that hold
    NaN, and when no token is left.
    """
    check_settings(temperature, top_p, top_k, min_p, repetition_penalty)
    if not 0 <= u < 1:
        raise UserError(f"the uniform number of a draw is {u}: it must lie in [0, 1)")
    scores = np.array(logits, np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise UserError(f"token logits have shape {scores.shape}: expected one row, [vocabulary]")
    _penalise(scores, _ids(previous, scores.size), repetition_penalty)
    scores[_ids(banned, scores.size)] = -math.inf
    best = int(
        np.argmax(scores)
    )  # argmax takes the first NaN for the largest, so this check sees every bad value
    if not math.isfinite(scores[best]):
        raise UserError("no token can be drawn: every logit is banned or -inf, or some are NaN or +inf")
    if temperature == 0:
        return best
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to weight 0, as it should
        weights = np.exp((scores - scores[best]) / temperature)
    return _draw(_filtered(weights, top_k, top_p, min_p), u)


def check_settings(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Raises UserError for the first setting out of range; a caller checks once, before it loads anything."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}: use a number of 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: use a number above 0 and at most 1 (1 = off)")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: use a whole number of 0 (off) or more")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p}: use a number from 0 (off) to 1")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise UserError(f"repetition_penalty is {repetition_penalty}: use a number above 0 (1 = off)")


def _ids(ids: Iterable[int], size: int) -> np.ndarray:
    """The distinct ids, int64. Raises UserError outside the vocabulary; numpy would take -1 for its last."""
    array = np.unique(np.fromiter(ids, np.int64))
    if array.size and not (array[0] >= 0 and array[-1] < size):
        raise UserError(
            f"token id {array[0] if array[0] < 0 else array[-1]} is outside the vocabulary of {size}"
        )
    return array


def _penalise(scores: np.ndarray, previous: np.ndarray, penalty: float) -> None:
    """Divides positive and multiplies negative scores by the penalty, in place (CTRL, section 4.1)."""
    chosen = scores[previous]
    scores[previous] = np.where(chosen > 0, chosen / penalty, chosen * penalty)


def _filtered(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The weights, those that the three filters remove set to 0. The largest is 1 and always stays."""
    keep = weights >= min_p
    if 0 < top_k < weights.size or top_p < 1:
        order = _likeliest_first(weights, top_k, top_p)
        kept = order[:top_k] if top_k else order
        reached = np.cumsum(weights[kept])
        ahead = np.concatenate([[0.0], reached[:-1]])
        total = reached[-1] if top_k else weights.sum()
        kept = kept[ahead < top_p * total]
        in_nucleus = np.zeros(weights.size, bool)
        in_nucleus[kept] = True
        keep &= in_nucleus
    return np.where(keep, weights, 0.0)


def _likeliest_first(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Ids from the likeliest on, as many as the filters can keep; of equals the lower id comes first everywhere.

    Sorting a whole vocabulary takes longer than a small model's step, and a nucleus is a few hundred of it.
    """
    count = min(top_k or HEAD, weights.size)
    least = np.partition(weights, weights.size - count)[weights.size - count]
    head = np.flatnonzero(weights >= least)  # equals of the last one stand in it too, so the order is unique
    if not top_k and weights[head].sum() < top_p * weights.sum():
        head = np.arange(weights.size)
    return head[np.argsort(-weights[head], kind="stable")]


def _draw(weights: np.ndarray, u: float) -> int:
    """The first id whose cumulative weight exceeds u times the total; ids of weight 0 are never drawn."""
    cumulative = np.cumsum(weights)
    # The largest float64 below 1 times the total still rounds below the total: this never runs off the end.
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
