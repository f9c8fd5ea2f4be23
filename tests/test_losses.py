from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.losses import image_errors, text_loss


def test_text_loss_is_the_summed_negative_log_probability() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 11)).astype(np.float32) * 3
    targets = rng.integers(0, 11, 7)
    weights = np.array([1, 1, 0, 1, 0.5, 1, 0], np.float32)
    shifted = logits.astype(np.float64)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    wanted = -(np.log(p[np.arange(7), targets]) * weights).sum()
    got = text_loss(mx.array(logits), mx.array(targets), mx.array(weights)).item()
    assert got == pytest.approx(wanted, rel=1e-6)


def test_padded_entries_have_no_loss_and_no_gradient() -> None:
    logits = mx.random.normal((4, 6), key=mx.random.key(0))
    targets = mx.array([1, 2, 0, 0])
    weights = mx.array([1.0, 1.0, 0.0, 0.0])
    assert text_loss(logits, targets, weights).item() == pytest.approx(
        text_loss(logits[:2], targets[:2], weights[:2]).item(), rel=1e-6
    )
    gradient = np.array(mx.grad(text_loss)(logits, targets, weights))
    assert (gradient[2:] == 0).all()
    assert (np.abs(gradient[:2]) > 0).all()


def test_text_loss_of_huge_logits_is_finite() -> None:
    logits = mx.array([[1e4, -1e4, 0.0]])
    assert text_loss(logits, mx.array([1]), mx.ones(1)).item() == pytest.approx(2e4)


def test_image_errors_are_means_over_the_elements_of_each_image() -> None:
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    got = image_errors(mx.array(prediction), mx.array(target))
    np.testing.assert_allclose(got, [((prediction[i] - target[i]) ** 2).mean() for i in range(3)], rtol=1e-6)
    assert image_errors(mx.zeros((0, 4, 5)), mx.zeros((0, 4, 5))).sum().item() == 0
