"""Token sampling against brute force: probabilities, filters, ties, bad input."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.errors import UserError
from mlx_transfusion.token_sampling import check_settings, sample_token

LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=9)
UNIT = st.floats(0, 1, exclude_max=True)
GRID = [(i + 0.5) / 2000 for i in range(2000)]


def frequencies(logits: Any, **settings: Any) -> np.ndarray:
    """How often each id is drawn over an even grid of u: its probability to 1/2000."""
    return np.bincount([sample_token(logits, u=u, **settings) for u in GRID], minlength=len(logits)) / len(
        GRID
    )


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    return weights / weights.sum()


def kept_by_brute_force(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters token by token, in exact order: likelier first, of equals the lower id."""
    p = [math.exp(value - max(logits)) for value in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-p[i], i))
    if top_k:
        ranked = ranked[:top_k]
    total = sum(p[i] for i in ranked)
    nucleus, reached = [], 0.0
    for i in ranked:
        if reached >= top_p * total:
            break
        nucleus.append(i)
        reached += p[i]
    return {i for i in nucleus if p[i] >= min_p * max(p)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float) -> None:
    logits = [0.3, -1.0, 2.0, 1.1, -math.inf]
    np.testing.assert_allclose(
        frequencies(logits, temperature=temperature), softmax(logits, temperature), atol=1e-3
    )


def test_u_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = np.log([0.25, 0.5, 0.25])
    drawn = {u: sample_token(logits, u=u) for u in (0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53)}
    assert list(drawn.values()) == [0, 0, 1, 1, 2, 2], drawn


@settings(deadline=None)
@given(logits=LOGITS, u=UNIT)
def test_temperature_zero_takes_the_first_of_the_likeliest(logits: list[float], u: float) -> None:
    assert sample_token(logits, temperature=0.0, u=u) == logits.index(max(logits))


@settings(deadline=None)
@given(logits=st.lists(st.integers(-8, 8), min_size=1, max_size=9), u=UNIT)
def test_a_tiny_temperature_is_greedy_among_equals(logits: list[int], u: float) -> None:
    drawn = sample_token(np.array(logits, np.float32), temperature=1e-310, u=u)
    assert logits[drawn] == max(logits)


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_brute_force_keeps(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    expected = kept_by_brute_force(logits, top_k, top_p, min_p)
    p = softmax(logits)
    # Draw in the middle of every kept token's share.
    kept = sorted(expected)
    edges = np.cumsum([0.0] + [p[i] for i in kept])
    drawn = [
        sample_token(logits, top_k=top_k, top_p=top_p, min_p=min_p, u=(low + high) / 2 / edges[-1])
        for low, high in pairwise(edges)
    ]
    assert drawn == kept


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 40, 3000]),
    st.floats(0.01, 1),
    st.sampled_from([0.5, 3, 10]),
)
@settings(deadline=None, max_examples=30)
def test_large_vocabularies_are_filtered_as_small_ones(
    seed: int, top_k: int, top_p: float, spread: float
) -> None:
    """Most of them is never sorted; rounded logits make many equals."""
    logits = np.round(np.random.default_rng(seed).normal(0, spread, 5000), 1)
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")[: top_k or None]
    reached = np.cumsum(weights[order])
    ahead = np.concatenate([[0.0], reached[:-1]])
    kept = order[ahead < top_p * (reached[-1] if top_k else weights.sum())]
    for u in (0.0, 0.37, 0.9, 1 - 1e-9):
        chosen = sample_token(logits, top_k=top_k, top_p=top_p, u=u)
        inside = np.sort(kept)
        reached = np.cumsum(weights[inside])
        assert chosen == inside[np.searchsorted(reached, u * reached[-1], side="right")]


def test_top_k_of_equals_takes_the_lower_ids() -> None:
    assert set(np.flatnonzero(frequencies([1.0, 1.0, 1.0, 1.0], top_k=2))) == {0, 1}


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(np.flatnonzero(frequencies(logits, top_p=0.5))) == {0}
    assert set(np.flatnonzero(frequencies(logits, top_p=0.51))) == {0, 1}
    np.testing.assert_allclose(frequencies(logits, top_p=0.9), [0.526, 0.316, 0.158, 0], atol=1e-3)


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(np.flatnonzero(frequencies(logits, min_p=0.25))) == {0, 1, 2}


def test_the_repetition_penalty_works_on_both_signs_and_once_an_id() -> None:
    logits = [2.0, -2.0, 1.0]
    found = frequencies(logits, repetition_penalty=2.0, previous=[0, 1, 0, 0])
    np.testing.assert_allclose(found, softmax([1.0, -4.0, 1.0]), atol=1e-3)
    assert sample_token([2.0, 1.5], temperature=0, repetition_penalty=2.0, previous=[0], u=0) == 1


@settings(deadline=None)
@given(logits=LOGITS, u=UNIT, data=st.data())
def test_banned_tokens_are_never_drawn(logits: list[float], u: float, data: st.DataObject) -> None:
    banned = data.draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1))
    for temperature in (0.0, 1.0):
        assert sample_token(logits, temperature=temperature, banned=banned, u=u) not in banned


@settings(deadline=None)
@given(logits=LOGITS, shift=st.floats(-100, 100), u=UNIT)
def test_a_drawn_token_is_always_possible(logits: list[float], shift: float, u: float) -> None:
    """Also for the largest u below 1: rounding must not send it past the last possible token."""
    padded = [-math.inf, *(value + shift for value in logits), -math.inf]
    assert 1 <= sample_token(padded, u=u) <= len(logits)
    assert 1 <= sample_token(padded, u=1 - 2**-53) <= len(logits)


@pytest.mark.parametrize(
    "convert",
    [np.float32, mx.array, lambda x: np.array(x, np.float16), list],
    ids=["f32", "mlx", "f16", "list"],
)
def test_every_kind_of_logits(convert: Callable[[Any], Any]) -> None:
    logits = convert(np.array([0.5, 2.0, -1.0], np.float32))
    assert sample_token(logits, temperature=0.0, u=0) == 1
    assert [sample_token(logits, u=u) for u in (0.05, 0.5, 0.99)] == [0, 1, 2]


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = np.array([1.0, 2.0])
    sample_token(logits, repetition_penalty=2.0, previous=[1], banned=[0], u=0.5)
    assert logits.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
    ],
)
def test_a_setting_out_of_range_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(**settings)
    with pytest.raises(UserError, match=message):
        sample_token([1.0, 2.0], u=0.0, **settings)


@pytest.mark.parametrize("u", [-0.1, 1.0, math.nan])
def test_a_uniform_number_out_of_range_is_one_line(u: float) -> None:
    with pytest.raises(UserError, match="uniform number"):
        sample_token([1.0, 2.0], u=u)


@pytest.mark.parametrize(
    ("logits", "banned"),
    [([1.0, 2.0], [0, 1]), ([-math.inf, -math.inf], []), ([1.0, math.nan], []), ([1.0, math.inf], [])],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_possible_token_is_one_line(logits: list[float], banned: list[int], temperature: float) -> None:
    with pytest.raises(UserError, match="no token can be drawn"):
        sample_token(logits, temperature=temperature, banned=banned, u=0.5)


@pytest.mark.parametrize("logits", [[[1.0, 2.0]], [], 3.0])
def test_logits_that_are_no_row_are_one_line(logits: Any) -> None:
    with pytest.raises(UserError, match="token logits have shape"):
        sample_token(logits, u=0.5)


@pytest.mark.parametrize("name", ["previous", "banned"])
@pytest.mark.parametrize("token", [-1, 2])
def test_an_id_outside_the_vocabulary_is_one_line(name: str, token: int) -> None:
    with pytest.raises(UserError, match=f"token id {token} is outside the vocabulary of 2"):
        sample_token([1.0, 2.0], u=0.5, **{name: [0, token]})  # type: ignore[arg-type]
