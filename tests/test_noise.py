"""Noise addressed by name: exact definition, golden values, independence."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError

WORDS = st.integers(0, 2**64 - 1)


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, written from the paper: 4 words in, 4 words out."""
    mask = 2**64 - 1
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (high >> 64) ^ counter[1] ^ key[0],
            high & mask,
            (low >> 64) ^ counter[3] ^ key[1],
            low & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def documented_words(kind: str, stream: str, seed: int, index: tuple[int, int, int], count: int) -> list[int]:
    key = [seed, int.from_bytes(hashlib.sha256(f"{kind}:{stream}".encode()).digest()[:8], "little")]
    words: list[int] = []
    while len(words) < count:
        words += philox_block([len(words) // 4 + 1, *index], key)
    return words[:count]


@settings(deadline=None)
@given(seed=WORDS, index=st.tuples(WORDS, WORDS, WORDS), stream=st.text(max_size=10), count=st.integers(1, 9))
def test_uniform_is_the_documented_definition(
    seed: int, index: tuple[int, int, int], stream: str, count: int
) -> None:
    words = documented_words("uniform", stream, seed, index, count)
    expected = [(word >> 11) / 2**53 for word in words]
    assert noise.uniform(seed, index, count, stream).tolist() == expected


def test_normal_integers_and_permutation_are_the_documented_definition() -> None:
    u = [(word >> 11) / 2**53 for word in documented_words("normal", "s", 9, (4, 0, 0), 6)]
    pairs = [(math.sqrt(-2 * math.log(1 - u[i])), 2 * math.pi * u[i + 1]) for i in (0, 2, 4)]
    expected = [radius * f(turn) for radius, turn in pairs for f in (math.cos, math.sin)]
    np.testing.assert_allclose(noise.normal(9, 4, 5, "s"), expected[:5], rtol=1e-6)
    words = documented_words("integers", "s", 9, (4, 0, 0), 5)
    assert noise.integers(9, 4, 1000, 5, "s").tolist() == [(w >> 11) * 1000 >> 53 for w in words]
    words = documented_words("permutation", "s", 9, (4, 0, 0), 7)
    assert noise.permutation(9, 4, 7, "s").tolist() == sorted(range(7), key=words.__getitem__)


def test_golden_values() -> None:
    """Published pictures are repeated from their seed: these numbers must never change."""
    np.testing.assert_allclose(
        noise.normal(7, 3, (2, 2)), [[1.864774, -1.0534041], [0.8132956, -1.1408497]], rtol=1e-6
    )
    assert float(noise.uniform(7, 3)) == 0.052215650357795074
    assert noise.uniform(7, (3, 1), 2, "image").tolist() == [0.5016499692581528, 0.43733574170454104]
    assert noise.integers(7, 3, 10, 5).tolist() == [8, 1, 5, 3, 6]
    assert noise.permutation(7, 0, 8).tolist() == [5, 2, 4, 6, 0, 3, 7, 1]


def test_a_large_array_begins_with_the_values_of_a_small_one() -> None:
    for draw in (noise.normal, noise.uniform):
        np.testing.assert_array_equal(draw(1, 2, (3, 5)).reshape(-1)[:7], draw(1, 2, 7))


@pytest.mark.parametrize(
    "other",
    [
        noise.normal(6, 3, 20000),
        noise.normal(5, 4, 20000),
        noise.normal(5, (3, 1), 20000),
        noise.normal(5, 3, 20000, "other"),
        noise.uniform(5, 3, 20000),
        noise.integers(5, 3, 1 << 53, 20000),
    ],
    ids=["seed", "index", "second index", "stream", "uniform", "integers"],
)
def test_draws_of_different_addresses_are_uncorrelated(other: np.ndarray) -> None:
    # 5 standard deviations of a correlation of 20,000 independent pairs.
    assert abs(np.corrcoef(noise.normal(5, 3, 20000), other)[0, 1]) < 5 / math.sqrt(20000)


def test_first_values_of_neighbouring_addresses_are_independent() -> None:
    """One value of each index: how training draws its angles."""
    u = np.array([float(noise.uniform(0, i)) for i in range(5000)])
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * 5000)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / math.sqrt(5000)


def test_moments_of_the_normal_and_range_of_the_rest() -> None:
    z = noise.normal(0, 0, 200_000).astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / z.size), power
    u = noise.uniform(0, 0, 100_000)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount(noise.integers(0, 0, 6, 60_000), minlength=6)
    assert counts.size == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 26  # chi-squared, 5 degrees of freedom, p = 1e-4


def test_types_and_shapes() -> None:
    assert noise.normal(0, 0, (2, 3)).dtype == np.float32
    assert noise.normal(0, 0, (2, 3)).shape == (2, 3)
    assert noise.normal(0, 0).shape == ()
    assert noise.normal(0, 0, (0, 4)).shape == (0, 4)
    assert noise.uniform(0, 0, 3).dtype == np.float64
    assert noise.integers(0, 0, 3, 4).dtype == np.int64


@settings(deadline=None)
@given(seed=WORDS, epoch=st.integers(0, 1000), n=st.integers(0, 50))
def test_permutation_is_one(seed: int, epoch: int, n: int) -> None:
    assert sorted(noise.permutation(seed, epoch, n).tolist()) == list(range(n))


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {tuple(noise.permutation(s, e, 20).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_numpy_integers_are_addresses_too() -> None:
    assert float(noise.uniform(int(np.int64(3)), np.int64(4))) == float(noise.uniform(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_one_line(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed {seed} is out of range"):
        noise.normal(seed, 0, 1)


@pytest.mark.parametrize("index", [-1, 2**64, (), (1, 2, 3, 4), (0, -1)])
def test_an_index_out_of_range_is_one_line(index: noise.Index) -> None:
    with pytest.raises(UserError, match="noise index"):
        noise.uniform(0, index)


@pytest.mark.parametrize("high", [0, -3, 2**53 + 1])
def test_a_bound_out_of_range_is_one_line(high: int) -> None:
    with pytest.raises(UserError, match="the bound must lie"):
        noise.integers(0, 0, high)
