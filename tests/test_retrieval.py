import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.evaluation.retrieval import (
    CaptionIndex,
    families,
    relative_edit_distance,
    retrieve_captions,
    retrieve_pictures,
    word_f1,
)

R = 40


def pictures(count: int = R, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def alone(count: int = R) -> np.ndarray:
    return np.arange(count)


# ---- pictures ----


def test_perfect_generator_is_always_right() -> None:
    references = pictures()
    own = np.array([3, 17, 39, 0])
    result = retrieve_pictures(references[own], own, references, alone())
    assert result.exact.all()
    assert result.variant.all()
    assert result.nearest.tolist() == own.tolist()
    np.testing.assert_allclose(result.cosine, 1)
    assert result.rank.tolist() == [1, 1, 1, 1]


def test_one_picture_for_every_caption_is_chance() -> None:
    references = pictures()
    result = retrieve_pictures(np.repeat(references[5:6], R, 0), alone(), references, alone())
    assert result.exact.mean() == 1 / R == result.exact_chance
    assert result.rank.mean() == (R + 1) / 2


def test_picture_of_cosine_zero_shares_its_rank() -> None:
    references = np.array([4, 2, 0], np.uint8).reshape(3, 1, 1, 1)
    result = retrieve_pictures(np.full((1, 1, 1, 1), 2, np.uint8), np.array([0]), references, alone(3))
    assert result.cosine[0] == 0
    assert result.rank[0] == 2  # all three are equal: the mean of places 1, 2 and 3
    assert result.nearest[0] == 0  # the first, not the darkest


def test_mean_picture_off_ends_the_advantage_of_pale_pictures() -> None:
    # White ground with one dark dot each; the query is the right dot, drawn far too faintly.
    references = np.full((4, 2, 2, 1), 255, np.uint8)
    for i in range(3):
        references[i].reshape(-1)[i] = 0  # the last reference stays blank: the pale one
    query = np.full((1, 2, 2, 1), 255, np.uint8)
    query.reshape(-1)[1] = 150
    plain = np.abs(query.astype(int) - references).reshape(4, -1).sum(1)
    assert plain.argmin() == 3  # plain distance prefers the blank picture
    result = retrieve_pictures(query, np.array([1]), references, alone(4))
    assert result.nearest[0] == 1


def test_a_variant_counts_only_as_variant() -> None:
    references = pictures(4)
    family = families(["a", "a-1", "a-2", "b"], [None, "a", "a", None])
    assert family.tolist() == [0, 0, 0, 1]
    result = retrieve_pictures(references[[2, 0, 3]], np.array([1, 1, 1]), references, family)
    assert result.exact.tolist() == [False, False, False]
    assert result.variant.tolist() == [True, True, False]
    assert result.exact_chance == 1 / 4
    assert result.variant_chance == 3 / 4


def test_a_family_needs_no_base_among_the_references() -> None:
    assert families(["x", "a-1", "a-2"], [None, "a", "a"]).tolist() == [0, 1, 1]


def test_identical_references_are_one_picture() -> None:
    references = pictures(6)
    references[4] = references[1]
    result = retrieve_pictures(references[[4, 1]], np.array([4, 4]), references, alone(6))
    assert result.nearest.tolist() == [1, 1]
    assert result.exact.all()
    assert result.variant.all()  # the own name is among those of the nearest picture
    assert result.exact_chance == 2 / 6
    assert result.rank.tolist() == [1.5, 1.5]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_pictures_against_brute_force(count: int, queries: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    generated = rng.integers(0, 256, (queries, 2, 2, 3), dtype=np.uint8)
    own = rng.integers(0, count, queries)
    family = rng.integers(0, 3, count)
    result = retrieve_pictures(generated, own, references, family)
    mean = references.reshape(count, -1).mean(0)
    for q in range(queries):
        a = generated[q].reshape(-1) - mean
        cosines = []
        for reference in references:
            b = reference.reshape(-1) - mean
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert result.nearest[q] == int(np.argmax(cosines))
        assert result.cosine[q] == pytest.approx(cosines[own[q]])
        assert result.exact[q] == (result.nearest[q] == own[q])
        assert result.variant[q] == (family[result.nearest[q]] == family[own[q]])
        assert result.rank[q] == 1 + sum(c > cosines[own[q]] + 1e-12 for c in cosines)


# ---- descriptions ----

CAPTIONS = [
    "waving hand",
    "waving hand: dark skin tone",
    "red heart",
    "Flag: Chile",
    "cat with tears of joy",
    "hand with fingers splayed",
]
FAMILY = np.array([0, 0, 1, 2, 3, 4])


def test_equal_captions_are_right_whatever_their_case_and_spacing() -> None:
    texts = ["waving hand", "WAVING  hand: dark skin tone", "red heart ", "flag: chile", *CAPTIONS[4:]]
    result = retrieve_captions(texts, np.arange(6), CAPTIONS, FAMILY)
    assert result.match.all()
    assert result.right.all()
    assert (result.word_f1 == 1).all()


def test_nearest_caption_may_be_right_without_a_match() -> None:
    result = retrieve_captions(["a red heart", "hand waving"], np.array([2, 0]), CAPTIONS, FAMILY)
    assert not result.match.any()
    assert result.right.all()


def test_caption_of_a_variant() -> None:
    result = retrieve_captions(["waving hand", "red heart"], np.array([1, 1]), CAPTIONS, FAMILY)
    assert result.right.tolist() == [False, False]
    assert result.variant.tolist() == [True, False]


def test_silence_is_wrong() -> None:
    result = retrieve_captions(["", "  "], np.array([0, 5]), CAPTIONS, FAMILY)
    assert result.nearest.tolist() == [-1, -1]
    assert not result.right.any()
    assert not result.variant.any()


def test_one_description_for_all_is_chance() -> None:
    result = retrieve_captions(["red heart"] * 6, np.arange(6), CAPTIONS, FAMILY)
    assert result.right.mean() == result.right_chance == 1 / 6


def test_ties_of_words_go_to_the_smaller_edit_distance_then_to_the_first() -> None:
    index = CaptionIndex(["blue cart", "blue cat", "blue car"])
    assert index.nearest("blue cas") == 1  # one letter from the second and the third
    assert index.nearest("blue carts") == 0
    assert CaptionIndex(["ab", "cd", "ce"]).nearest("cf") == 1  # no word in common at all


def test_an_equal_caption_wins_over_one_of_the_same_words() -> None:
    # "c c c" and "c, c, c" have the same words; only one is equal.
    index = CaptionIndex(["c, c, c", "c c c"])
    assert index.nearest("c c c") == 1


def test_word_f1_by_hand() -> None:
    assert word_f1("red heart", "red red heart") == pytest.approx(4 / 5)
    assert word_f1("man, man, boy", "man, boy") == pytest.approx(4 / 5)
    assert word_f1("a", "b") == 0
    assert word_f1("", "") == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_edit_distance_by_hand(a: str, b: str, distance: int) -> None:
    assert relative_edit_distance(a, b) == distance / max(len(a), len(b))
