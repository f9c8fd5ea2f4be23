"""Causal attention inside a picture (`image_attention = "causal"`), in every way a picture is read or painted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from full_forward import full_forward, random_images

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.sequence import Image, Text, attention_mask, pack

CAPTIONS = [[40, 41, 42], [50]]


@pytest.fixture(scope="module", params=["linear", "unet"])
def model(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: Callable[..., Transfusion]
) -> Transfusion:
    config = dataclasses.replace(
        tiny_config, image_attention="causal", patch_encoder=request.param, unet_channels=8
    )
    return make_model(config, seed=2)


def read_captions(model: Transfusion) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [2, T] up to BOI, padded, and their lengths."""
    rows = [[1, *c, 4] for c in CAPTIONS]
    width = max(map(len, rows))
    return np.array([[*r, *[0] * (width - len(r))] for r in rows]), np.array([len(r) for r in rows])


def test_a_patch_sees_what_stands_before_it() -> None:
    packed = pack([[Text((1, 4)), Image(0, 4), Text((5, 2))]], 9)
    mask = attention_mask(packed.document, packed.image, bidirectional=False)[0, 0]
    np.testing.assert_array_equal(mask[:8, :8], np.tril(np.ones((8, 8), bool)))
    assert mask[8].sum() == 1, "padding sees itself"


def test_a_change_of_a_patch_reaches_later_patches_alone(
    tiny_config: ModelConfig, make_model: Callable[..., Transfusion]
) -> None:
    linear = make_model(dataclasses.replace(tiny_config, image_attention="causal"), seed=2)
    n = linear.config.patches_per_image
    patches, angle = random_images(linear, 1)
    document = [Text((1, 40, 4)), Image(0, n), Text((5, 2))]
    before = full_forward(linear, [document], 3 + n + 2, patches, angle)[1]
    patches[0, 1] += 1
    after = full_forward(linear, [document], 3 + n + 2, patches, angle)[1]
    moved = np.abs(after - before).max(-1)[0] > 0
    assert moved.tolist() == [False, True, True, True]


def test_cached_equals_recomputed(model: Transfusion) -> None:
    """Caption, finished picture, text, noisy picture: the cache's masks are those of training (1e-4)."""
    n = model.config.patches_per_image
    patches, angle = random_images(model, 4)
    angle[:2] = 0
    _, cache = model.prefill(*read_captions(model))
    model.extend_image(mx.array(patches[:2]), cache)
    logits = model.extend_text(np.array([[5, 60, 4]] * 2), np.array([3, 3]), cache)
    v = model.velocity(mx.array(patches[2:]), mx.array(angle[2:]), cache)
    for i, caption in enumerate(CAPTIONS):
        segments = [Text((1, *caption, 4)), Image(0, n), Text((5, 60, 4)), Image(1, n)]
        own = [i, 2 + i]
        full, prediction, _ = full_forward(model, [segments], 32, patches[own], angle[own])
        np.testing.assert_allclose(logits[i], full[0, len(caption) + 2 + n + 2], atol=1e-4)
        np.testing.assert_allclose(v[i], prediction[1], atol=1e-4)


def test_the_pass_of_distillation_is_the_same(model: Transfusion) -> None:
    ids, lengths = read_captions(model)
    patches, angle = random_images(model, 2)
    x, a = mx.array(patches), mx.array(angle)
    _, prefix = model.read_prefix(mx.array(ids))
    _, cache = model.prefill(ids, lengths)
    wanted = model.velocity(x, a, cache)
    np.testing.assert_allclose(model.paint(x, a, prefix, mx.array(lengths)), wanted, atol=1e-5)


def test_torch_has_the_same_rule(model: Transfusion) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_tools import make_batch, to_torch_model

    from mlx_transfusion.torch.attention import block_mask, dense_mask
    from mlx_transfusion.torch.batch import to_example
    from mlx_transfusion.training.step import to_arrays

    batch = make_batch(model.config)
    document, image = batch.packed.document, batch.packed.image
    wanted = attention_mask(document, image, bidirectional=False)
    places = torch.tensor(document).long(), torch.tensor(image).long()
    np.testing.assert_array_equal(dense_mask(*places, bidirectional=False), wanted)
    blocks = block_mask(*places, bidirectional=False)
    t = torch.arange(document.shape[1])
    seen = torch.stack([blocks.mask_mod(b, 0, t[:, None], t[None]) for b in range(len(document))])
    np.testing.assert_array_equal(seen, wanted[:, 0])

    arrays, *_ = to_arrays(batch, model)
    np.testing.assert_array_equal(arrays.mask, wanted)
    twin = to_torch_model(model)
    with torch.no_grad():
        theirs = twin(to_example(batch, model.config, torch.device("cpu")).arrays)
    for ours, other in zip(model(arrays), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-4)

    patches, angle = random_images(model, 2)
    ids, lengths = read_captions(model)
    ours = model.paint(
        mx.array(patches), mx.array(angle), model.read_prefix(mx.array(ids))[1], mx.array(lengths)
    )
    with torch.no_grad():
        _, prefix = twin.read_prefix(torch.tensor(ids))
        other = twin.paint(torch.tensor(patches), torch.tensor(angle), prefix, torch.tensor(lengths))
    np.testing.assert_allclose(ours, other, atol=1e-4)


def test_another_word_is_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(UserError, match='image_attention is "full", expected one of bidirectional, causal'):
        dataclasses.replace(tiny_config, image_attention="full")
