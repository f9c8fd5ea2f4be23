"""Retrieval: is what the model made nearest to the thing it was asked for, among all references? (numpy only)

Pictures are compared by the cosine of their pixels with the mean picture of the references taken off: plain
pixel distance favours pale pictures, and without the subtraction every picture on a white ground resembles
every other. Captions are compared by shared words, then by edit distance.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PictureRetrieval:
    """Results for Q generated pictures among R references."""

    nearest: np.ndarray
    """Index of the nearest reference, the first of identical ones. int [Q]"""
    exact: np.ndarray
    """The nearest is the picture's own reference, or identical to it. bool [Q]"""
    variant: np.ndarray
    """The nearest is of the own reference's family (itself included). bool [Q]"""
    cosine: np.ndarray
    """Cosine with the own reference. float64 [Q]"""
    rank: np.ndarray
    """Place of the own reference, 1 is best; equals share the mean of their places. float64 [Q]"""
    exact_chance: float
    """What a generator that ignores the caption gets on average."""
    variant_chance: float


def families(images: Sequence[str], bases: Sequence[str | None]) -> np.ndarray:
    """Family number of each picture: a variant belongs to the picture it names as its base. int [R]"""
    names = [image if base is None else base for image, base in zip(images, bases, strict=True)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def retrieve_pictures(
    generated: np.ndarray, own: np.ndarray, references: np.ndarray, family: np.ndarray
) -> PictureRetrieval:
    """Find each generated picture's nearest reference.

    generated: uint8 [Q, H, W, C]; own: index of the reference each was to be, int [Q]; references: uint8
    [R, H, W, C]; family: int [R] (`families`). References with equal pixels count as one picture with several
    names: nothing could tell them apart.
    """
    distinct, first, picture = np.unique(
        references.reshape(len(references), -1), axis=0, return_index=True, return_inverse=True
    )
    picture = picture.reshape(-1)  # numpy 2.0 alone returned it with the shape of the input
    mean = references.reshape(len(references), -1).mean(0)
    cosine = _unit(generated.reshape(len(generated), -1) - mean) @ _unit(distinct - mean).T  # [Q, distinct]
    # Of equally near pictures the first reference wins, whatever order np.unique sorted them into.
    by_reference = np.argsort(first)
    best = by_reference[cosine[:, by_reference].argmax(1)]
    mine = cosine[np.arange(len(own)), picture[own]]
    relatives = family[own][:, None] == family  # [Q, R]
    size = np.bincount(picture, minlength=len(distinct))
    better = ((cosine > mine[:, None]) * size).sum(1)
    equal = ((cosine == mine[:, None]) * size).sum(1)
    exact_members = picture[own][:, None] == picture
    names_of_nearest = picture == best[:, None]
    return PictureRetrieval(
        nearest=first[best],
        exact=best == picture[own],
        variant=(relatives & names_of_nearest).any(1),
        cosine=mine,
        rank=better + (equal + 1) / 2,
        exact_chance=float(exact_members.mean()),
        variant_chance=float(relatives.mean()),
    )


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one, float64; a row of zeros stays (its cosine with everything is 0)."""
    x = x.astype(np.float64)
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


@dataclass(frozen=True)
class CaptionRetrieval:
    """Results for Q descriptions among R captions."""

    nearest: np.ndarray
    """Index of the nearest caption, -1 for an empty description. int [Q]"""
    match: np.ndarray
    """The description is the own caption, word for word. bool [Q]"""
    right: np.ndarray
    """The nearest caption is the own one. bool [Q]"""
    variant: np.ndarray
    """The nearest caption belongs to the own one's family (itself included). bool [Q]"""
    word_f1: np.ndarray
    """Shared words with the own caption. float64 [Q]"""
    right_chance: float
    variant_chance: float


def retrieve_captions(
    descriptions: Sequence[str], own: np.ndarray, captions: Sequence[str], family: np.ndarray
) -> CaptionRetrieval:
    """Find each description's nearest caption.

    own: index of the caption each should be, int [Q]; family: int [R]. Texts are compared without case, kind
    of Unicode form and spacing. The nearest caption has the largest F1 of words; of several, the smallest
    edit distance relative to the longer text (so an equal caption always wins); of several, it is the first.
    """
    index = CaptionIndex(captions)
    nearest = np.array([index.nearest(text) for text in descriptions], int)
    mine = [index.texts[i] for i in own]
    found = [index.texts[i] if i >= 0 else "" for i in nearest]
    relatives = family[own][:, None] == family
    return CaptionRetrieval(
        nearest=nearest,
        match=np.array([normalise(d) == m for d, m in zip(descriptions, mine, strict=True)], bool),
        right=np.array([f == m for f, m in zip(found, mine, strict=True)], bool),
        variant=(nearest >= 0) & (family[nearest] == family[own]),
        word_f1=np.array([word_f1(d, m) for d, m in zip(descriptions, mine, strict=True)]),
        right_chance=1 / len(captions),
        variant_chance=float(relatives.mean()),
    )


class CaptionIndex:
    """The captions of all references, ready to be searched."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.texts = [normalise(c) for c in captions]
        bags = [Counter(words(text)) for text in self.texts]
        self._total = np.array([bag.total() for bag in bags])
        self._column = {w: i for i, w in enumerate(dict.fromkeys(w for bag in bags for w in bag))}
        self._counts = np.zeros((len(bags), len(self._column)), np.int16)
        for row, bag in enumerate(bags):
            for word, count in bag.items():
                self._counts[row, self._column[word]] = count

    def nearest(self, description: str) -> int:
        """Index of the nearest caption (see `retrieve_captions`); -1 when the description is empty."""
        text = normalise(description)
        if not text:
            return -1
        bag = Counter(words(text))
        shared = np.zeros(len(self.texts), int)
        for word, count in bag.items():
            if word in self._column:
                shared += np.minimum(self._counts[:, self._column[word]], count)
        f1 = 2 * shared / np.maximum(self._total + bag.total(), 1)
        tied = np.flatnonzero(f1 == f1.max())
        return int(min(tied, key=lambda i: (relative_edit_distance(text, self.texts[i]), i)))


def normalise(text: str) -> str:
    """Caseless NFKC text with single spaces: what a lower-casing tokenizer keeps of it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Runs of letters and digits of a normalised text."""
    return re.findall(r"\w+", text)


def word_f1(a: str, b: str) -> float:
    """Harmonic mean of precision and recall of words, repetitions counted; 0 without any."""
    x, y = Counter(words(normalise(a))), Counter(words(normalise(b)))
    total = x.total() + y.total()
    return 2 * (x & y).total() / total if total else 0.0


def relative_edit_distance(a: str, b: str) -> float:
    """Levenshtein distance in characters divided by the longer length: 0 for equal texts, at most 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1] / max(len(a), len(b), 1)
