"""Rows shared out between cores: the same numbers, and the BLAS gets its threads back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_transfusion import blas, lanes
from mlx_transfusion.generation import paint
from mlx_transfusion.losses import text_loss
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import padded
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.config import OptimizerConfig
from mlx_transfusion.training.optimizer import ema_update, make_optimizer


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A BLAS that may use three threads and writes down what it is told; a lane may be as small as one token."""
    told: list[int] = []
    monkeypatch.setattr(blas, "threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", told.append)
    monkeypatch.setattr(lanes, "MIN_TOKENS", 1)
    yield told
    assert lanes.split(8, 100) == []


def test_lanes_are_open_inside_only_and_the_blas_gets_its_threads_back(threads: list[int]) -> None:
    assert lanes.split(4, 10) == []
    with lanes.lanes(4):
        assert [rows for _, rows in lanes.split(4, 10)] == [slice(0, 1), slice(1, 2), slice(2, 4)]
        with lanes.lanes(2):  # those outside stay as they are
            assert len(lanes.split(4, 10)) == 3
        assert len({str(s) for s, _ in lanes.split(4, 10)}) == 3
        assert lanes.split(1, 10) == []
        assert threads == [1]
    assert threads == [1, 3]
    with pytest.raises(KeyError), lanes.lanes(2):
        raise KeyError
    assert threads == [1, 3, 1, 3]


def test_one_row_and_a_blas_that_cannot_be_told_leave_everything_as_it_is(
    threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with lanes.lanes(1):
        assert lanes.split(4, 10) == []
    monkeypatch.setattr(blas, "threads", lambda: None)
    with lanes.lanes(8):
        assert lanes.split(4, 10) == []
    assert threads == []


def test_short_rows_share_a_lane(threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MIN_TOKENS", 16)
    with lanes.lanes(8):
        assert [rows for _, rows in lanes.split(8, 4)] == [slice(0, 4), slice(4, 8)]
        assert lanes.split(7, 4) == []


@pytest.mark.parametrize(
    "lengths", [[5, 5, 5, 5], [3, 7, 5, 7]], ids=["no mask", "a mask and offsets by row"]
)
def test_a_velocity_is_the_same(tiny_model: Transfusion, threads: list[int], lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    ids, _ = padded([rng.integers(6, 200, n).tolist() for n in lengths], 0)
    cache: KVCache = tiny_model.prefill(ids, np.array(lengths))[1]
    x, angle = (
        mx.random.normal((4, *tiny_model.latent_shape), key=mx.random.key(1)),
        mx.array([0.1, 0.5, 1.0, 1.5]),
    )
    wanted = np.array(tiny_model.velocity(x, angle, cache))
    with lanes.lanes(4):
        found = np.array(tiny_model.velocity(x, angle, cache))
        copy = cache.snapshot()
        tiny_model.extend_image(x, copy)
        mx.eval(copy.layers)
    tiny_model.extend_image(x, cache)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(tree_flatten(copy.layers), tree_flatten(cache.layers), strict=True):
        np.testing.assert_allclose(np.array(one[1]), np.array(other[1]), rtol=1e-4, atol=1e-5)


def test_a_guided_picture_is_the_same(tiny_model: Transfusion, threads: list[int]) -> None:
    settings = GenerationSettings(steps=3, sampler="midpoint", guidance=2.0)
    prefix = tiny_model.image_prefix([7, 8, 9])
    found = np.array(paint(tiny_model, [prefix], [5], settings))
    assert threads == [1, 3]
    threads.clear()
    lanes.MIN_TOKENS = 1 << 20  # the fixture puts it back
    np.testing.assert_allclose(
        found, np.array(paint(tiny_model, [prefix], [5], settings)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_is_the_same(tiny_model: Transfusion, threads: list[int], name: str) -> None:
    weights = tiny_model.parameters()
    gradients = tree_map(lambda w: mx.random.normal(w.shape, key=mx.random.key(w.size)), weights)

    def updated() -> list[tuple[str, mx.array]]:
        optimizer = make_optimizer(OptimizerConfig(name=name))
        optimizer.init(weights)
        new = optimizer.apply_gradients(gradients, weights)
        average = ema_update(weights, new, mx.array(0.9))
        mx.eval(new, average)
        return list(tree_flatten((new, average)))

    wanted = updated()
    with lanes.lanes(3):
        found = updated()
    assert all(np.array_equal(np.array(a), np.array(b)) for (_, a), (_, b) in zip(wanted, found, strict=True))


def test_pieces_of_work_go_to_the_lane_that_has_least(threads: list[int]) -> None:
    def places(shares: lanes.Shares, sizes: list[int]) -> list[str]:
        found = []
        for size in sizes:
            with shares.lane(size):
                found.append(str(mx.default_stream(mx.cpu)))
        return found

    with lanes.lanes(3):
        first, second, third, fourth, fifth = places(lanes.Shares(), [5, 2, 4, 1, 1])
    assert len({first, second, third}) == 3
    assert fourth == fifth == second
    assert len(set(places(lanes.Shares(), [1, 1, 1]))) == 1


def test_without_lanes_no_stream_is_named(tiny_model: Transfusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an update and a loss stay there."""
    monkeypatch.setattr(mx, "stream", lambda *_: pytest.fail("a stream was named"))
    weights = tiny_model.parameters()
    optimizer = make_optimizer(OptimizerConfig(name="muon"))
    optimizer.init(weights)
    mx.eval(ema_update(weights, optimizer.apply_gradients(weights, weights), mx.array(0.9)))
    mx.eval(text_loss(mx.zeros((7, 11)), mx.zeros(7, mx.int32), mx.ones(7)))


def test_a_text_loss_is_the_same(threads: list[int]) -> None:
    rng = np.random.default_rng(0)
    logits, weights = mx.array(rng.normal(size=(7, 11))), mx.array(rng.random(7))
    targets = mx.array(rng.integers(0, 11, 7))
    gradient = mx.value_and_grad(text_loss)
    wanted, by_logits = gradient(logits, targets, weights)
    with lanes.lanes(3):
        found, in_lanes = gradient(logits, targets, weights)
        mx.eval(found, in_lanes)
    np.testing.assert_allclose(found.item(), wanted.item(), rtol=1e-6)
    np.testing.assert_array_equal(np.array(in_lanes), np.array(by_logits))


def test_a_thread_has_streams_of_its_own(tiny_model: Transfusion, threads: list[int]) -> None:
    settings = GenerationSettings(steps=1, guidance=2.0)
    pictures: list[np.ndarray] = []

    def work() -> None:
        pictures.append(np.array(paint(tiny_model, [tiny_model.image_prefix([7])], [0], settings)))

    work()
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(pictures) == 3
    assert all(np.array_equal(pictures[0], p) for p in pictures[1:])
