from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from full_forward import full_forward, random_images

from mlx_transfusion.models.cache import GROWTH, KVCache
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.sequence import Image, Text

PROMPTS = [[1, 40, 41, 42, 4], [1, 4], [1, 50, 4], [1, 60, 61, 62, 63, 64, 4]]


def padded(rows: list[list[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    return np.array([r + [pad] * (width - len(r)) for r in rows]), np.array([len(r) for r in rows])


def test_prefill_equals_the_training_forward(any_model: Transfusion) -> None:
    logits, _ = any_model.prefill(*padded(PROMPTS))
    none = np.zeros((0, any_model.config.patches_per_image, any_model.config.patch_dim), np.float32)
    for row, prompt in zip(np.array(logits), PROMPTS, strict=True):
        full, _, _ = full_forward(any_model, [[Text(tuple(prompt))]], 8, none, none[:, 0, 0])
        np.testing.assert_allclose(row, full[0, len(prompt) - 1], atol=1e-4)


def test_rows_of_different_lengths_are_independent_of_each_other_and_of_the_padding(
    any_model: Transfusion,
) -> None:
    together, cache = any_model.prefill(*padded(PROMPTS))
    other_padding, _ = any_model.prefill(*padded(PROMPTS, pad=77))
    np.testing.assert_allclose(other_padding, together, atol=1e-5)
    assert cache.lengths.tolist() == [5, 2, 3, 7]
    x, angle = map(mx.array, random_images(any_model, 4))
    v = any_model.velocity(x, angle, cache)
    for i, prompt in enumerate(PROMPTS):
        alone, own = any_model.prefill(*padded([prompt]))
        np.testing.assert_allclose(alone[0], together[i], atol=1e-4)
        np.testing.assert_allclose(
            any_model.velocity(x[i : i + 1], angle[i : i + 1], own)[0], v[i], atol=1e-4
        )


def test_token_by_token_equals_all_at_once(any_model: Transfusion) -> None:
    all_at_once, _ = any_model.prefill(*padded(PROMPTS))
    going = list(range(len(PROMPTS)))  # the prompts that have not ended
    _, cache = any_model.prefill(*padded([p[:1] for p in PROMPTS]))
    for t in range(1, 7):
        left = [i for i in going if len(PROMPTS[i]) > t]
        cache = cache.select([going.index(i) for i in left])
        going = left
        tokens = np.array([[PROMPTS[i][t]] for i in going])
        logits = any_model.extend_text(tokens, np.ones(len(going), int), cache)
        for row, i in zip(np.array(logits), going, strict=True):
            if len(PROMPTS[i]) == t + 1:
                np.testing.assert_allclose(row, all_at_once[i], atol=1e-4)
    assert cache.lengths.tolist() == [7]


def test_a_story_with_two_pictures_equals_one_full_pass(any_model: Transfusion) -> None:
    """Text, picture, text, noisy picture, with rows of different lengths: cached = recomputed (1e-4)."""
    c = any_model.config
    n = c.patches_per_image
    captions = [[40, 41, 42], [50]]
    after = [[60], [61, 62, 63]]
    patches, angle = random_images(any_model, 4)
    angle[:2] = 0  # the finished pictures
    _, cache = any_model.prefill(*padded([[1, *t, 4] for t in captions]))
    any_model.extend_image(mx.array(patches[:2]), cache)
    logits = any_model.extend_text(*padded([[5, *t, 4] for t in after]), cache)
    v = any_model.velocity(mx.array(patches[2:]), mx.array(angle[2:]), cache)
    for i in range(2):
        segments = [Text((1, *captions[i], 4)), Image(0, n), Text((5, *after[i], 4)), Image(1, n)]
        own = [i, 2 + i]
        full, prediction, _ = full_forward(any_model, [segments], 32, patches[own], angle[own])
        last = len(captions[i]) + 2 + n + len(after[i]) + 1
        np.testing.assert_allclose(logits[i], full[0, last], atol=1e-4)
        wanted = prediction[1]
        if c.prediction == "epsilon":
            a = angle[2 + i]
            wanted = (wanted - np.sin(a) * patches[2 + i]) / np.cos(a)
        np.testing.assert_allclose(v[i], wanted, atol=1e-4)


def test_velocity_leaves_the_cache_as_it_was(tiny_model: Transfusion) -> None:
    _, cache = tiny_model.prefill(*padded(PROMPTS))
    before, valid = list(cache.layers), cache.valid.copy()
    x, angle = map(mx.array, random_images(tiny_model, 4))
    first = tiny_model.velocity(x, angle, cache)
    assert all(a is b for a, b in zip(cache.layers, before, strict=True))
    assert (cache.valid == valid).all()
    assert (tiny_model.velocity(x, angle, cache) == first).all().item()


def test_a_snapshot_does_not_follow(tiny_model: Transfusion) -> None:
    _, cache = tiny_model.prefill(*padded(PROMPTS[:1]))
    copy, again = cache.snapshot(), cache.snapshot()
    token = np.array([[30]])
    one = np.ones(1, int)
    first = tiny_model.extend_text(token, one, copy)
    assert cache.lengths.tolist() == [5]
    assert copy.lengths.tolist() == [6]
    np.testing.assert_array_equal(tiny_model.extend_text(token, one, again), first)


def test_select_repeats_and_reorders_rows(tiny_model: Transfusion) -> None:
    _, cache = tiny_model.prefill(*padded(PROMPTS))
    x, angle = map(mx.array, random_images(tiny_model, 4))
    v = tiny_model.velocity(x, angle, cache)
    order = [2, 0, 0, 3]
    chosen = cache.select(order)
    assert chosen.batch == 4
    assert chosen.lengths.tolist() == [3, 5, 5, 7]
    index = mx.array(order)
    np.testing.assert_allclose(tiny_model.velocity(x[index], angle[index], chosen), v[index], atol=1e-5)


@pytest.mark.parametrize("swap", [False, True])
def test_stack_joins_caches_of_different_widths(any_model: Transfusion, swap: bool) -> None:
    _, long = any_model.prefill(*padded(PROMPTS[2:]))
    _, short = any_model.prefill(*padded(PROMPTS[1:2]))
    first, second = (short, long) if swap else (long, short)
    both = first.stack(second)
    assert both.lengths.tolist() == [*first.lengths, *second.lengths]
    assert (long.batch, short.batch, both.batch) == (2, 1, 3)
    x, angle = map(mx.array, random_images(any_model, 3))
    b = first.batch
    wanted = [any_model.velocity(x[:b], angle[:b], first), any_model.velocity(x[b:], angle[b:], second)]
    np.testing.assert_allclose(any_model.velocity(x, angle, both), mx.concatenate(wanted), atol=1e-4)
    # and text goes on behind the columns that hold nothing
    tokens = np.full((3, 1), 33)
    logits = any_model.extend_text(tokens, np.ones(3, int), both)
    alone = any_model.extend_text(tokens[:1], np.ones(1, int), short)
    np.testing.assert_allclose(logits[0 if swap else 2], alone[0], atol=1e-4)


def test_offset_is_one_number_only_when_all_rows_agree() -> None:
    cache = KVCache(1, 3)
    assert cache.offset() == 0
    cache.append([], np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], bool))
    assert cache.offset() == 2
    cache = KVCache(1, 3)
    cache.append([], np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1]], bool))
    offset = cache.offset()
    assert isinstance(offset, mx.array)
    assert offset.tolist() == [2, 3, 1]
    assert cache.visible(np.ones((3, 1), bool)).tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]


def test_positions_may_move_otherwise_than_columns() -> None:
    cache = KVCache(1, 2)
    cache.append([], np.ones((2, 3), bool), advance=np.array([1, 1]))
    assert (cache.offset(), cache.lengths.tolist()) == (1, [3, 3])
    cache.positions = np.array([1, 7])
    both = cache.stack(cache.select([1]))._widened(5)
    assert both.positions.tolist() == [1, 7, 7]
    assert cache.snapshot().positions.tolist() == [1, 7]


def test_columns_are_added_in_place_and_copies_stay() -> None:
    """Keys written token by token, past the columns that are allocated at once, are those of one concatenation."""
    rng, cache = np.random.default_rng(0), KVCache(1, 2)
    kept = np.zeros((2, 3, 0, 4), np.float32)
    copies: list[tuple[KVCache, int]] = []
    for count in [5, *[1] * (GROWTH + 4), 7]:
        new = rng.normal(size=(2, 3, count, 4)).astype(np.float32)
        cache.append([(mx.array(new), mx.array(-new))], np.ones((2, count), bool))
        kept = np.concatenate([kept, new], 2)
        if kept.shape[2] in (5, 9, GROWTH + 5):
            copies.append((cache.snapshot(), kept.shape[2]))
    copies.append((cache, kept.shape[2]))
    for copy, columns in copies:
        assert copy.layers[0] is not None
        np.testing.assert_array_equal(copy.layers[0][0], kept[:, :, :columns])
        np.testing.assert_array_equal(copy.layers[0][1], -kept[:, :, :columns])
