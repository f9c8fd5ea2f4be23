"""n-gram language models that a trained model must beat, over the same tokens (numpy only).

A document is its token ids with BOS before and EOS behind; every token but BOS is predicted. Both models give
every id of the vocabulary some probability. Their one free number is chosen on a slice of the training texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mlx_transfusion.errors import UserError

PSEUDO_COUNTS = (0.01, 0.03, 0.1, 0.3, 1.0)
DISCOUNTS = tuple(i / 20 for i in range(2, 20))
SLICE = 20
"""Every 20th training document chooses the free number."""


class LanguageModel(Protocol):
    """What a baseline can do."""

    parameter: float

    def log_probability(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """log P(target | previous) in nats, int [K], int [K] -> float64 [K]."""
        ...


class Unigram:
    """P(w) = (c(w) + k) / (n + k V): the frequency of each token, k added to every count."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, k: float) -> None:
        self.parameter = k
        count = np.bincount(pairs(documents)[1], minlength=vocab_size)
        self._log = np.log((count + k) / (count.sum() + k * vocab_size))

    def log_probability(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """log P(target) in nats: [K] -> [K]; `previous` plays no part."""
        return self._log[target]


class KneserNeyBigram:
    """Interpolated Kneser-Ney with one absolute discount D (Kneser and Ney 1995; Chen and Goodman 1998).

        P(w | u) = max(c(uw) - D, 0) / c(u) + D N(u.) / c(u) Q(w)
        Q(w)     = max(N(.w) - D, 0) / N(..) + D N(.) / N(..) / V

    N(u.) is the number of different successors of u, N(.w) of predecessors of w, N(..) of pairs, N(.) of
    tokens w with any predecessor. After a token never seen, P = Q.
    """

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, discount: float) -> None:
        self.parameter = discount
        self._vocab_size = vocab_size
        previous, target = pairs(documents)
        codes, counts = np.unique(previous.astype(np.int64) * vocab_size + target, return_counts=True)
        first, second = codes // vocab_size, codes % vocab_size
        self._codes, self._counts = codes, counts
        self._context = np.bincount(first, weights=counts, minlength=vocab_size)
        self._successors = np.bincount(first, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        seen = np.count_nonzero(predecessors)
        kept = np.maximum(predecessors - discount, 0) / len(codes)
        self._continuation = kept + discount * seen / len(codes) / vocab_size

    def log_probability(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """log P(target | previous) in nats: [K], [K] -> [K]."""
        code = previous.astype(np.int64) * self._vocab_size + target
        at = np.minimum(np.searchsorted(self._codes, code), len(self._codes) - 1)
        count = np.where(self._codes[at] == code, self._counts[at], 0)
        context = self._context[previous]
        total = np.maximum(context, 1)
        spread = np.where(context > 0, self.parameter * self._successors[previous] / total, 1.0)
        return np.log(np.maximum(count - self.parameter, 0) / total + spread * self._continuation[target])


def pairs(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(token, next token) of all documents, none across two: int [K], int [K]."""
    return (
        np.concatenate([d[:-1] for d in documents]).astype(np.int64),
        np.concatenate([d[1:] for d in documents]).astype(np.int64),
    )


def document_nats(model: LanguageModel, documents: Sequence[np.ndarray]) -> np.ndarray:
    """-log P of each document in nats: float64 [D]."""
    previous, target = pairs(documents)
    nats = -model.log_probability(previous, target)
    ends = np.cumsum([len(d) - 1 for d in documents])
    return np.diff(np.concatenate([[0.0], np.cumsum(nats)[ends - 1]]))


def fit_unigram(documents: Sequence[np.ndarray], vocab_size: int) -> Unigram:
    """The unigram model with the best k, fitted to all documents. Raises UserError below two."""
    return Unigram(documents, vocab_size, _best(Unigram, documents, vocab_size, PSEUDO_COUNTS))


def fit_bigram(documents: Sequence[np.ndarray], vocab_size: int) -> KneserNeyBigram:
    """The bigram model with the best discount, fitted to all documents. Raises UserError below two."""
    return KneserNeyBigram(documents, vocab_size, _best(KneserNeyBigram, documents, vocab_size, DISCOUNTS))


def _best(
    kind: type[Unigram] | type[KneserNeyBigram],
    documents: Sequence[np.ndarray],
    vocab_size: int,
    choices: Sequence[float],
) -> float:
    """The free number under which every 20th document is likeliest after a fit to the others."""
    if len(documents) < 2:
        raise UserError(f"the n-gram baselines need 2 or more training texts, got {len(documents)}")
    held_out = documents[::SLICE]
    rest = [d for i, d in enumerate(documents) if i % SLICE]
    nats = [document_nats(kind(rest, vocab_size, c), held_out).sum() for c in choices]
    return choices[int(np.argmin(nats))]
