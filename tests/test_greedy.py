from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.errors import UserError
from mlx_transfusion.greedy import ban, check_choice, likeliest
from mlx_transfusion.token_sampling import sample_token


def test_the_choice_is_that_of_the_pure_function() -> None:
    logits = np.random.default_rng(0).integers(-3, 4, (40, 12)).astype(np.float32)  # many equals
    banned = [0, 5, 11]
    tokens, scores = likeliest(mx.array(logits), ban(banned, 12))
    wanted = [sample_token(row, temperature=0, banned=banned, u=0) for row in logits]
    assert tokens.tolist() == wanted
    assert scores.tolist() == [row[i] for row, i in zip(logits, wanted, strict=True)]
    check_choice(scores)


@pytest.mark.parametrize(
    ("row", "banned"),
    [([1.0, 2.0], [0, 1]), ([1.0, math.nan], []), ([math.nan, 1.0], []), ([1.0, math.inf], [])],
)
def test_no_choice(row: list[float], banned: list[int]) -> None:
    scores = likeliest(mx.array([[1.0, 2.0], row]), ban(banned, 2))[1]
    with pytest.raises(UserError, match="no token can be drawn"):
        check_choice(scores)
