"""Large pictures in tiles: the numbers of the whole, no seams, memory that does not grow."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from autoencoder_tools import randomize

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_tiles import (
    Tiling,
    decode_tiled,
    decoder_reach,
    encode_tiled,
    encoder_reach,
)

TINY = AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2)


@cache
def tiny() -> AutoencoderKL:
    model = AutoencoderKL(TINY)
    randomize(model)
    return model


@cache
def latents(height: int = 38, width: int = 45) -> np.ndarray:
    """Smooth over a few elements, and different from place to place, as pictures are."""
    noise = np.random.default_rng(0).normal(size=(1, height, width, 2))
    slope = np.linspace(-1, 1, width)[None, None, :, None]
    return (noise + slope).astype(np.float32)


@cache
def decoded() -> np.ndarray:
    return np.array(tiny().decode(mx.array(latents())))


def test_one_batch_of_windows_gives_the_numbers_of_the_whole() -> None:
    z = latents()[:, :, :38]
    assert decoder_reach(TINY) + 13 < 38  # a tile with its margin is smaller than the picture
    found = decode_tiled(tiny(), z, Tiling(tile=13, window=38, max_keys=10**6))
    assert found.shape == (1, 76, 76, 3)
    np.testing.assert_allclose(found, np.array(tiny().decode(mx.array(z))), atol=1e-4)


def test_encoding_gives_the_numbers_of_the_whole() -> None:
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 60, 76, 3)).astype(np.float32)
    mean, logvar = encode_tiled(tiny(), pixels[:, :, :60], Tiling(tile=11, window=30, max_keys=10**6))
    assert encoder_reach(TINY) + 11 < 30
    whole = tiny().encode(mx.array(pixels[:, :, :60]))
    np.testing.assert_allclose(mean, np.array(whole.mean), atol=1e-4)
    np.testing.assert_allclose(logvar, np.array(whole.logvar), atol=1e-4)
    several, _ = encode_tiled(tiny(), pixels, Tiling(tile=11, window=10))
    assert several.shape == (2, 30, 38, 2)
    alone, _ = encode_tiled(tiny(), pixels[1:], Tiling(tile=11, window=10))
    np.testing.assert_array_equal(several[1:], alone)


def test_there_are_no_seams() -> None:
    """What differs from the whole picture drifts smoothly: it jumps no more at borders of tiles than elsewhere."""
    error = decode_tiled(tiny(), latents(), Tiling(tile=13, window=9)) - decoded()
    jumps = np.abs(np.diff(error[0], axis=1)).mean((0, 2))
    borders = np.arange(26, 90, 26) - 1
    assert np.abs(error).max() > 1e-4
    assert jumps[borders].max() < 1.5 * np.delete(jumps, borders).max()


def test_more_of_the_picture_measured_is_nearer_to_the_whole() -> None:
    errors = []
    for batches in (1, 16):
        found = decode_tiled(tiny(), latents(), Tiling(tile=13, window=6, batches=batches))
        errors.append(np.sqrt(((found - decoded()) ** 2).mean()))
    assert errors[1] < errors[0]
    assert errors[1] < 0.05 * decoded().std()


def test_attention_can_look_at_a_part_of_a_large_picture() -> None:
    errors = []
    for keys in (50, 800):  # of 1710
        found = decode_tiled(tiny(), latents(), Tiling(tile=13, window=6, batches=16, max_keys=keys))
        errors.append(np.sqrt(((found - decoded()) ** 2).mean()) / decoded().std())
    assert errors[1] < 0.2
    assert errors[1] < errors[0]


def test_memory_does_not_grow_with_the_picture() -> None:
    def peak(run) -> int:  # type: ignore[no-untyped-def]
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run()
        return mx.get_peak_memory() - before

    small, large = latents(48, 48), latents(48, 144)
    tiling = Tiling(tile=12, window=12, batches=2, max_keys=500)
    tiled = [peak(lambda z=z: decode_tiled(tiny(), z, tiling)) for z in (small, large)]
    whole = [peak(lambda z=z: mx.eval(tiny().decode(mx.array(z)))) for z in (small, large)]
    assert whole[1] > 2.5 * whole[0]
    assert tiled[1] < 1.2 * tiled[0]
    pictures = [np.zeros((1, 48, width, 3), np.float32) for width in (96, 288)]
    tiled = [peak(lambda p=p: encode_tiled(tiny(), p, tiling)) for p in pictures]
    assert tiled[1] < 1.2 * tiled[0]


def test_a_picture_of_one_tile_is_run_whole() -> None:
    z = latents()[:, :10, :10]
    np.testing.assert_array_equal(decode_tiled(tiny(), z), np.array(tiny().decode(mx.array(z))))


def test_bad_input_is_refused_as_by_the_whole() -> None:
    with pytest.raises(UserError, match="use the autoencoder that they were made with"):
        decode_tiled(tiny(), np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match="takes multiples of 2"):
        encode_tiled(tiny(), np.zeros((1, 5, 4, 3), np.float32))
    with pytest.raises(UserError, match="tiling: window is 0"):
        Tiling(window=0)
