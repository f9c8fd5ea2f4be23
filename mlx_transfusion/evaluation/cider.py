"""CIDEr-D: how much a description shares with what people wrote of the same picture (arXiv 1411.5726, section 6).

Of the paper's two formulas this is the second, which coco-caption computes under the plain name CIDEr: words are not
stemmed, an n-gram counts at most as often as in the reference, and another length than the reference's costs. For
n = 1..4, with g(s) the vector of counts times inverse document frequencies of the n-grams of a text,

    10 / m  sum_j  exp(-(l(c) - l(s_j))^2 / (2 sigma^2))  min(g(c), g(s_j)) . g(s_j) / (|g(c)| |g(s_j)|)

is averaged over the m references of a picture and over n. Here the texts are split into words as for retrieval
(lower case, no punctuation), where coco-caption runs a Java tokenizer: figures compare with its own as far as both
split alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlx_transfusion.evaluation.retrieval import normalise, words

ORDERS = range(1, 5)
SIGMA = 6.0
SCALE = 10.0

Vector = dict[tuple[str, ...], float]


def cider_d(descriptions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The score of each description against its picture's references, 0 to 10: float64 [Q].

    An n-gram's document frequency is the number of the Q pictures with it in a reference. Of one picture alone every
    frequency has the logarithm 0, and the score is 0.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        frequency.update({gram for text in texts for n in ORDERS for gram in _grams(text, n)})
    documents = math.log(max(1, len(references)))

    def vector(text: str, n: int) -> Vector:
        counts = _grams(text, n)
        return {gram: c * (documents - math.log(max(1, frequency[gram]))) for gram, c in counts.items()}

    def score(text: str, reference: str) -> float:
        gap = len(_words(text)) - len(_words(reference))
        likeness = [_clipped_cosine(vector(text, n), vector(reference, n)) for n in ORDERS]
        return SCALE * math.exp(-(gap**2) / (2 * SIGMA**2)) * sum(likeness) / len(likeness)

    return np.array(
        [
            sum(score(text, reference) for reference in own) / len(own)
            for text, own in zip(descriptions, references, strict=True)
        ]
    )


def _words(text: str) -> list[str]:
    return words(normalise(text))


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    """The n-grams of a text and how often each stands there."""
    split = _words(text)
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def _clipped_cosine(candidate: Vector, reference: Vector) -> float:
    """min(c, s) . s / (|c| |s|); 0 where either is zero."""
    shared = sum(min(value, reference[g]) * reference[g] for g, value in candidate.items() if g in reference)
    lengths = _length(candidate) * _length(reference)
    return shared / lengths if lengths else 0.0


def _length(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector.values()))
