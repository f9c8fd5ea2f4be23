"""What tiling costs in exactness: mosaics of pictures, encoded and decoded whole and in tiles.

    python benchmarks/autoencoder_tiles.py FOLDER ROWS.jsonl PICTURES.tar

Prints, for sides of mosaics and tilings, the standard deviation of the difference between tiled and whole over that
of the whole: its mean over some mosaics, and the worst.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.folder import load_autoencoder
from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.models.autoencoder_tiles import Tiling, decode_tiled, encode_tiled
from mlx_transfusion.training.pixels import load_pixels
from mlx_transfusion.training.rows import ImageRef, Source, load_rows

CASES = (
    (4, Tiling(tile=8, window=8, batches=1)),
    (4, Tiling(tile=16, window=8, batches=1)),
    (8, Tiling(tile=16, window=16, batches=1)),
    (8, Tiling(tile=16, window=16, batches=4)),
    (16, Tiling()),
)
"""Pictures along one side of a mosaic, and how it is cut."""
SEEDS = 3


def mosaic(refs: list[ImageRef], side: int, size: int, seed: int) -> np.ndarray:
    """side x side pictures of size x size pixels: float32 [1, H, W, 3] in [-1, 1]."""
    chosen = np.random.default_rng(seed).permutation(len(refs))[: side**2]
    pixels = load_pixels([refs[i] for i in chosen], size, size, 1)
    rows = pixels.reshape(side, side, size, size, 3).transpose(0, 2, 1, 3, 4)
    return to_signed(rows.reshape(1, side * size, side * size, 3))


def drift(tiled: np.ndarray, whole: np.ndarray) -> float:
    """Standard deviation of the difference over that of the whole."""
    return float((tiled - whole).std() / whole.std())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("images", type=Path)
    args = parser.parse_args()
    model = load_autoencoder(args.folder).latents
    found = load_rows(Source(args.rows, args.images)).rows
    refs = list(dict.fromkeys(one for row in found for one in row.segments if isinstance(one, ImageRef)))
    size = model.config.sample_size
    print("pixels  tile window batches   decode (worst)   encode (worst)")
    for side, tiling in CASES:
        decoded, encoded = [], []
        for seed in range(SEEDS if side < 16 else 1):
            pixels = mosaic(refs, side, size, seed)
            mean = np.array(model.encode(mx.array(pixels)).mean)
            decoded.append(drift(decode_tiled(model, mean, tiling), np.array(model.decode(mx.array(mean)))))
            encoded.append(drift(encode_tiled(model, pixels, tiling)[0], mean))
        numbers = "".join(f"   {np.mean(d):6.2%} ({max(d):6.2%})" for d in (decoded, encoded))
        print(f"{side * size:6} {tiling.tile:5} {tiling.window:6} {tiling.batches:7} {numbers}", flush=True)


if __name__ == "__main__":
    main()
