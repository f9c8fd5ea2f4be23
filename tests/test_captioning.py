"""CIDEr-D against figures of coco-caption and a second implementation; CLIP's retrieval by hand; FID's formula."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.evaluation.cider import cider_d
from mlx_transfusion.evaluation.distances import frechet, kernel_distance
from mlx_transfusion.evaluation.picture_text import picture_text, recalls

# ---- CIDEr-D ----

COCO = [
    ("a red cat on the mat", ["a red cat on the mat"], 10.0),
    ("the dog runs in the big green park",
     ["a dog is running through the park", "a dog runs in the park"], 2.72279606),
    ("cat cat cat cat", ["a black cat with a red hat", "the cat"], 0.37293774),
    ("", ["a blue star"], 0.0),
    ("star", ["a blue star", "star"], 2.08611794),
    ("a man and a woman with the long long long umbrella in the rain of the city",
     ["a man with an umbrella", "a woman in the rain"], 0.21424111),
]  # fmt: skip
"""Description, references, and the score that pycocoevalcap 1.2 (coco-caption in Python) gave to the six together."""


def test_figures_of_coco_caption() -> None:
    scores = cider_d([c[0] for c in COCO], [c[1] for c in COCO])
    np.testing.assert_allclose(scores, [c[2] for c in COCO], rtol=0, atol=1e-8)
    assert scores.mean() == pytest.approx(2.5660154778279813, rel=1e-12)


def test_case_and_punctuation_do_not_count() -> None:
    texts = [["A Red cat, on the mat!"], ["blue star"]]
    np.testing.assert_allclose(cider_d(["a red cat on the mat", "BLUE STAR."], texts)[0], 10)
    # No bigram, trigram or 4-gram is longer than two words: half of the four cosines are 0.
    np.testing.assert_allclose(cider_d(["a red cat on the mat", "BLUE STAR."], texts)[1], 5)


def test_one_picture_alone_scores_nothing() -> None:
    assert cider_d(["a cat"], [["a cat"]]).tolist() == [0]


words_ = st.lists(st.sampled_from(["a", "cat", "dog", "red", "on"]), max_size=7).map(" ".join)
pictures_ = st.lists(st.tuples(words_, st.lists(words_, min_size=1, max_size=3)), min_size=2, max_size=5)


@settings(max_examples=25, deadline=None)
@given(pictures_)
def test_a_second_implementation(pictures: list[tuple[str, list[str]]]) -> None:
    np.testing.assert_allclose(cider_d(*zip(*pictures, strict=True)), second(pictures), rtol=1e-9, atol=1e-12)


def second(pictures: list[tuple[str, list[str]]]) -> list[float]:
    """The formula over dense vectors of all n-grams that occur."""

    def count(text: str, gram: tuple[str, ...]) -> int:
        w, n = text.split(), len(gram)
        return sum(tuple(w[i : i + n]) == gram for i in range(len(w)))

    texts = [t for c, refs in pictures for t in (c, *refs)]
    out = []
    for candidate, references in pictures:
        total = 0.0
        for n in (1, 2, 3, 4):
            split = [t.split() for t in texts]
            grams = sorted({tuple(w[i : i + n]) for w in split for i in range(len(w) - n + 1)})
            seen = np.array([sum(any(count(r, g) for r in refs) for _, refs in pictures) for g in grams])
            idf = np.log(len(pictures)) - np.log(np.maximum(seen, 1))
            c = idf * [count(candidate, g) for g in grams]
            for reference in references:
                s = idf * [count(reference, g) for g in grams]
                norm = np.linalg.norm(c) * np.linalg.norm(s)
                gap = len(candidate.split()) - len(reference.split())
                cosine = np.minimum(c, s) @ s / norm if norm else 0.0
                total += 10 * math.exp(-(gap**2) / 72) * cosine / len(references) / 4
        out.append(total)
    return out


# ---- pictures and captions ----


def test_retrieval_by_hand() -> None:
    pictures = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = np.array([[2.0, 0.1], [1.0, 0.9], [0.0, -1.0]])
    out = picture_text(pictures, texts, ["a", "b", "c"], seed=0)
    cosine = np.array([2 / math.hypot(2, 0.1), 0.9 / math.hypot(1, 0.9), -1 / math.sqrt(2)])
    assert out["mean_cosine"] == pytest.approx(cosine.mean())
    assert out["clip_score"] == pytest.approx(2.5 * np.maximum(cosine, 0).mean())
    assert out["text_of_picture"] == {"1": pytest.approx(2 / 3)}
    assert out["picture_of_text"] == {"1": pytest.approx(1 / 3)}


def test_equal_captions_are_one_and_ties_are_no_help() -> None:
    likeness = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.2, 0.2, 0.2]])
    alone, same = np.eye(3, dtype=bool), np.eye(3, dtype=bool)
    same[0, 1] = same[1, 0] = True
    assert recalls(likeness, alone) == {"1": pytest.approx(1 / 3)}
    assert recalls(likeness, same) == {"1": pytest.approx(2 / 3)}
    assert recalls(np.zeros((12, 12)), np.eye(12, dtype=bool)) == {"1": 0, "5": 0, "10": 1}


# ---- formulas of the distances ----


@pytest.mark.parametrize(("rows", "others", "dimensions"), [(60, 90, 24), (200, 200, 48), (50, 400, 12)])
def test_frechet_by_the_matrix_root(rows: int, others: int, dimensions: int) -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy has the matrix root of pytorch-fid's formula")
    rng = np.random.default_rng(rows)
    mix = rng.normal(size=(dimensions, dimensions))
    a, b = rng.normal(size=(rows, dimensions)) @ mix, rng.normal(size=(others, dimensions)) + 0.3
    ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
    gap = a.mean(0) - b.mean(0)
    theirs = gap @ gap + np.trace(ca) + np.trace(cb) - 2 * np.trace(linalg.sqrtm(ca @ cb).real)
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-6)


def test_kernel_by_its_sums() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 30)), rng.normal(size=(50, 30)) + 0.2
    k = {}
    for (name, x), (other, y) in itertools.product((("a", a), ("b", b)), repeat=2):
        kernel = (x @ y.T / 30 + 1) ** 3
        k[name + other] = (
            (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)) if x is y else kernel.mean()
        )
    assert kernel_distance(a, b) == pytest.approx(k["aa"] + k["bb"] - 2 * k["ab"], rel=1e-6)
