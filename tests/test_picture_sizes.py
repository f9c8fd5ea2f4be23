"""Several picture sizes in one model: buckets, positions, packing, and the same numbers by every way through it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from full_forward import train_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.patches import edge_waves
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import prefill
from mlx_transfusion.picture_sizes import best, nearest
from mlx_transfusion.sequence import Image, Segment, Text

SIZES: dict[str, Any] = {
    "patch_positions": "coordinates", "image_sizes": ((8, 12), (12, 8), (4, 4)), "max_position": 64,
}  # fmt: skip
UNET = {"patch_encoder": "unet", "unet_channels": 8, "unet_blocks": 1}
MakeModel = Callable[..., Transfusion]
side = st.integers(1, 400)
sizes_ = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6, unique=True)


# ---- buckets ----


@settings(max_examples=200, deadline=None)
@given(side, side, sizes_)
def test_no_other_size_is_nearer_in_aspect(height: int, width: int, sizes: list[tuple[int, int]]) -> None:
    def cropped(size: tuple[int, int]) -> float:
        """What is left of the picture in that size."""
        ratio = width * size[0] / (height * size[1])
        return min(ratio, 1 / ratio)

    chosen = nearest(height, width, sizes)
    assert best(height, width, sizes) in chosen
    assert max(map(cropped, sizes)) == pytest.approx(min(map(cropped, chosen)))
    assert len({w / h for h, w in chosen}) <= 2  # the aspects on either side may be equally far


@settings(max_examples=100, deadline=None)
@given(sizes_, st.data())
def test_a_picture_of_a_size_keeps_it(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(sizes))
    assert best(*size, sizes) == size


def test_of_one_aspect_the_largest_that_is_filled() -> None:
    sizes = [(32, 32), (48, 48), (24, 32)]
    assert nearest(100, 100, sizes) == [(32, 32), (48, 48)]
    assert [best(n, n, sizes) for n in (8, 32, 40, 48, 500)] == [
        (32, 32),
        (32, 32),
        (32, 32),
        (48, 48),
        (48, 48),
    ]
    assert best(75, 100, sizes) == (24, 32)
    assert best(200, 60, sizes) == (48, 48)  # nothing is higher than wide


# ---- configuration ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": ((8, 10),)}, "image 10x8 cannot be cut into patches of 4"),
        ({"image_sizes": ((0, 8),)}, "image 8x0 cannot be cut"),
        ({"image_sizes": ((8, 8),)}, "image_sizes repeats a size: 8x8, 8x8"),
        ({"patch_positions": "none"}, '"none" cannot tell sizes apart: image_sizes needs "coordinates"'),
        ({"patch_positions": "learned"}, '"learned" cannot tell sizes apart'),
    ],
)
def test_bad_sizes(tiny_config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny_config, **(SIZES | changes))


def test_config_json_lists_the_sizes(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, **SIZES)
    assert config.to_dict()["image_sizes"] == [[8, 12], [12, 8], [4, 4]]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.layout.picture_tokens == 6 + 2  # the largest
    old = tiny_config.to_dict()
    del old["image_sizes"]
    assert ModelConfig.from_dict(old) == tiny_config
    turned = config.at_size(12, 8)
    assert turned.sizes == ((12, 8), (8, 8), (8, 12), (4, 4))
    assert turned.at_size(8, 8).sizes[0] == (8, 8)
    with pytest.raises(UserError, match="expected a list of 2"):
        ModelConfig.from_dict(tiny_config.to_dict() | {"image_sizes": [[8, 8, 3]]})


# ---- positions ----


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_no_two_places_look_alike(a: int, b: int, c: int, d: int) -> None:
    first, second = edge_waves(a, b), edge_waves(c, d)
    assert first.shape == (a * b, first.shape[1])
    everywhere = np.concatenate([first, second] if (a, b) != (c, d) else [first])
    gaps = np.abs(everywhere[:, None] - everywhere[None]).max(-1) + np.eye(len(everywhere))
    assert gaps.min() > 0.01


def test_turning_the_picture_turns_the_places() -> None:
    waves = edge_waves(2, 3).reshape(2, 3, 2, 4, -1)  # cosines and sines; top, bottom, left, right
    turned = edge_waves(3, 2).reshape(3, 2, 2, 4, -1)
    np.testing.assert_array_equal(waves, turned.transpose(1, 0, 2, 3, 4)[:, :, :, [2, 3, 0, 1]])
    np.testing.assert_allclose(waves, waves[::-1][:, :, :, [1, 0, 2, 3]], atol=1e-7)


# ---- packing ----

segments_ = st.lists(
    st.one_of(st.integers(1, 5).map(lambda n: Text((9,) * n)), st.integers(1, 7)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(st.lists(segments_, min_size=1, max_size=5), st.integers(0, 3))
def test_patches_of_several_numbers_find_their_places(drawn: list[list[Any]], unused: int) -> None:
    counts = [s for d in drawn for s in d if isinstance(s, int)]
    order = np.random.default_rng(len(counts)).permutation(len(counts)).tolist()  # stacked in another order
    stacked = [0] * len(counts)
    number = iter(order)
    documents: list[list[Segment]] = [
        [Image(next(number), s) if isinstance(s, int) else s for s in d] for d in drawn
    ]
    for d in documents:
        for s in d:
            if isinstance(s, Image):
                stacked[s.index] = s.patches
    packed = sequence.pack(documents, 48, patches=[*stacked, *[5] * unused])
    used = sum(stacked)
    assert len(packed.patch_index) == used + 5 * unused
    assert not packed.patch_index[used:].any()
    flat_rows = packed.patch_row.reshape(-1)
    np.testing.assert_array_equal(flat_rows[packed.patch_index[:used]], np.arange(used))
    pictures = packed.image.reshape(-1)[packed.patch_index[:used]]
    np.testing.assert_array_equal(pictures, np.repeat(np.arange(len(stacked)), stacked))
    if not unused:
        plain = sequence.pack(documents, 48)
        np.testing.assert_array_equal(plain.patch_index, packed.patch_index)


# ---- the model ----


def several(config: ModelConfig, make_model: MakeModel, **changes: Any) -> Transfusion:
    return make_model(dataclasses.replace(config, **SIZES, **changes), scale=0.15)


def noisy(model: Transfusion, size: tuple[int, int], count: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed + 100 * size[0] + size[1])
    patches = rng.normal(size=(count, math.prod(model.config.grid(size)), model.config.patch_dim))
    return mx.array(patches.astype(np.float32)), mx.array(rng.uniform(0.1, 1.4, count).astype(np.float32))


@pytest.mark.parametrize("changes", [{}, UNET, UNET | {"patch_skip": True, "image_attention": "causal"}])
def test_packed_rows_equal_each_picture_alone(
    tiny_config: ModelConfig, make_model: MakeModel, changes: dict[str, Any]
) -> None:
    model = several(tiny_config, make_model, **changes)
    c = model.config
    captions = [(9, 10), (11,), (12, 13, 14), (15,), (16,)]
    of = [(8, 8), (8, 12), (12, 8), (8, 12), (4, 4)]
    groups = [noisy(model, size, of.count(size)) for size in c.sizes]
    order = [i for size in c.sizes for i, one in enumerate(of) if one == size]
    documents = [
        sequence.document([Text(ids), Image(order.index(i), math.prod(c.grid(of[i])))], c)
        for i, ids in enumerate(captions)
    ]
    packed = sequence.pack(documents, 32)
    (patches, angle), *more = groups
    arrays = train_arrays(packed, np.array(patches), np.array(angle), c.bidirectional)
    _, predictions = model.predict(arrays._replace(more=tuple(more)))
    seen = dict.fromkeys(c.sizes, 0)
    for ids, size in zip(captions, of, strict=True):
        k, group = seen[size], c.sizes.index(size)
        seen[size] += 1
        x, angles = groups[group]
        cache = prefill(model, [[c.bos_token_id, *ids, c.boi_token_id]])
        alone = model.at_size(*size).velocity(x[k : k + 1], angles[k : k + 1], cache)
        np.testing.assert_allclose(predictions[group][k : k + 1], alone, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, UNET])
@pytest.mark.parametrize("size", [(8, 12), (12, 8), (16, 4)])
def test_derivative_in_forward_mode(
    tiny_config: ModelConfig, make_model: MakeModel, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    model = several(tiny_config, make_model, **changes)
    c = model.config
    x, angle = noisy(model, size, 2)
    dx, _ = noisy(model, size, 2, seed=5)
    _, prefix = model.read_prefix(mx.array([[c.bos_token_id, 9, c.boi_token_id]] * 2))
    view, lengths = model.resized(size), mx.array([3, 3])

    def f(x: mx.array, a: mx.array) -> mx.array:
        return view.paint(x, a, prefix, lengths)

    _, (along,) = mx.jvp(f, [x, angle], [dx, mx.ones_like(angle)])
    h = 1e-2
    differences = (f(x + h * dx, angle + h) - f(x - h * dx, angle - h)) / (2 * h)
    np.testing.assert_allclose(along, differences, rtol=0, atol=2e-2 * float(mx.abs(differences).max()))


def test_sizes_of_equally_many_patches_differ(tiny_config: ModelConfig, make_model: MakeModel) -> None:
    model = several(tiny_config, make_model)
    x, angle = noisy(model, (8, 12), 1)
    cache = prefill(model, [[1, 9, 4]])
    wide, high = (model.at_size(*size).velocity(x, angle, cache) for size in ((8, 12), (12, 8)))
    assert float(mx.abs(wide - high).max()) > 1e-3


def test_a_view_shares_weights_and_follows_them(tiny_config: ModelConfig, make_model: MakeModel) -> None:
    model = several(tiny_config, make_model)
    view = model.at_size(8, 12)
    assert view.picture_size == (8, 12)
    assert view.latent_shape == (6, 48)
    assert model.picture_size == (8, 8)
    assert model.at_size(8, 8) is model
    model.update({"norm": {"weight": model.norm.weight * 2}})
    assert view.norm.weight is model.norm.weight
    pixels = mx.random.uniform(shape=(1, 8, 12, 3), key=mx.random.key(0))
    np.testing.assert_allclose(view.decode(view.encode(pixels)), pixels, atol=1e-5)


def test_sizes_that_cannot_be_painted(
    tiny_config: ModelConfig, make_model: MakeModel, tiny_model: Transfusion
) -> None:
    model = several(tiny_config, make_model)
    with pytest.raises(
        UserError, match="10x8 cannot be cut into patches of 4 pixels: this model learnt 8x8, 12x8, 8x12"
    ):
        model.at_size(8, 10)
    with pytest.raises(UserError, match="0x8 cannot be cut"):
        model.at_size(8, 0)
    with pytest.raises(UserError, match="32x32 is 64 patches, and this model's longest sequence is 64"):
        model.at_size(32, 32)
    with pytest.raises(UserError, match="12x8: this model paints 8x8 pictures only"):
        tiny_model.at_size(8, 12)


def test_reading_a_picture_of_any_size(tiny_config: ModelConfig, make_model: MakeModel) -> None:
    model = several(tiny_config, make_model)
    c = model.config
    pixels = mx.random.uniform(shape=(1, 12, 8, 3), key=mx.random.key(1))
    cache = prefill(model, [[c.bos_token_id]])
    logits = model.read_picture(pixels, cache)
    patches = np.array(model.encode(pixels))
    group = c.sizes.index((12, 8))
    groups = [
        (mx.array(patches), mx.zeros(1)) if i == group else (noisy(model, size, 0)[0], mx.zeros(0))
        for i, size in enumerate(c.sizes)
    ]
    document = [Text((c.bos_token_id, c.boi_token_id)), Image(0, 6), Text((c.eoi_token_id,))]
    packed = sequence.pack([document], 9)
    arrays = train_arrays(packed, np.array(groups[0][0]), np.array(groups[0][1]))
    whole, _ = model.predict(arrays._replace(more=tuple(groups[1:])))
    np.testing.assert_allclose(logits, whole[-1:], atol=1e-4)
