from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.models.patches import AngleEmbedding, PatchDecoder, PatchEncoder, patchify, unpatchify
from mlx_transfusion.models.transfusion import Transfusion


@pytest.mark.parametrize(
    ("height", "width", "p", "c"), [(8, 12, 4, 3), (6, 4, 2, 1), (4, 4, 1, 8), (8, 8, 8, 2)]
)
def test_patchify_is_raster_order_inside_and_outside(height: int, width: int, p: int, c: int) -> None:
    images = np.arange(2 * height * width * c).reshape(2, height, width, c)
    wanted = [
        [
            [image[y * p + i, x * p + j, k] for i in range(p) for j in range(p) for k in range(c)]
            for y in range(height // p)
            for x in range(width // p)
        ]
        for image in images
    ]
    patches = patchify(mx.array(images), p)
    np.testing.assert_array_equal(np.array(patches), np.array(wanted))
    np.testing.assert_array_equal(np.array(unpatchify(patches, height, width, p)), images)


def test_pixels_to_patches_and_back(tiny_model: Transfusion) -> None:
    c = dataclasses.replace(tiny_model.config, image_mean=(0.2, -0.1, 0.4), image_std=0.6)
    model = Transfusion(c)
    pixels = np.random.default_rng(0).random((3, c.image_height, c.image_width, 3)).astype(np.float32)
    patches = model.encode(mx.array(pixels))
    assert patches.shape == (3, c.patches_per_image, c.patch_dim)
    normalised = (pixels * 2 - 1 - np.array([0.2, -0.1, 0.4])) / 0.6
    np.testing.assert_allclose(patches[1, 0, :3], normalised[1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(model.decode(patches), pixels, atol=1e-6)
    bright = model.decode(patches + 100)
    assert bright.max().item() == 1
    assert model.decode(patches - 100).min().item() == 0


def test_the_angle_embedding_is_slow_in_the_angle(tiny_config: ModelConfig) -> None:
    """sCM needs d/da of order one: no frequency above 1 (arXiv 2410.11081, 4.1)."""
    embedding = AngleEmbedding(dataclasses.replace(tiny_config, time_frequencies=32))
    frequencies = np.array(embedding._frequencies)
    assert frequencies.max() == 1
    assert frequencies.min() > 0
    assert (np.diff(frequencies) < 0).all()
    one = AngleEmbedding(dataclasses.replace(tiny_config, time_frequencies=1))
    assert np.array(one._frequencies).tolist() == [1]

    angles = mx.linspace(0, math.pi / 2, 9)
    out = embedding(angles)
    assert out.shape == (9, tiny_config.hidden_size)
    _, (slope,) = mx.jvp(embedding, [angles], [mx.ones(9)])
    assert slope.abs().max().item() < 3
    assert slope.square().mean().sqrt().item() > 1e-3
    different = mx.abs(out[1:] - out[:-1]).max(1)
    assert different.min().item() > 1e-4  # and it does tell angles apart


def test_the_encoder_adds_the_angle_to_every_patch(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, patch_positions="learned")
    for c in (tiny_config, config):
        encoder = PatchEncoder(c)
        patches = mx.random.normal((2, c.patches_per_image, c.patch_dim), key=mx.random.key(0))
        angle = mx.random.normal((2, c.hidden_size), key=mx.random.key(1))
        zero, skips = encoder(patches, mx.zeros_like(angle))
        assert skips == ()
        np.testing.assert_allclose(
            encoder(patches, angle)[0] - zero,
            np.broadcast_to(np.array(angle)[:, None], zero.shape),
            atol=1e-5,
        )
        flat = encoder(mx.zeros_like(patches), mx.zeros_like(angle))[0] - encoder.proj.bias
        if c.patch_positions == "none":
            assert mx.abs(flat).max().item() < 1e-6  # equal patches are equal tokens, wherever they stand
        else:
            np.testing.assert_allclose(flat[1], encoder.position, atol=1e-6)
            assert mx.abs(encoder.position[0] - encoder.position[1]).max().item() > 1e-3


def test_the_decoder_starts_at_zero_and_the_skip_is_per_element(tiny_config: ModelConfig) -> None:
    for skip in (False, True):
        c = dataclasses.replace(tiny_config, patch_skip=skip)
        decoder = PatchDecoder(c)
        assert all((value == 0).all().item() for _, value in tree_flatten(decoder.parameters()))
        assert ("skip_gain" in decoder) == skip
        hidden = mx.random.normal((2, c.patches_per_image, c.hidden_size))
        patches = mx.random.normal((2, c.patches_per_image, c.patch_dim))
        angle = mx.random.normal((2, c.hidden_size))
        assert mx.abs(decoder(hidden, patches, angle)).max().item() == 0
        if skip:
            gain = mx.arange(c.patch_dim).astype(mx.float32)
            decoder.skip_gain.bias = gain
            np.testing.assert_allclose(decoder(hidden, patches, angle), patches * gain, rtol=1e-6)
