"""Draw pictures and what autoencoders give back of them: a row of originals, then a row for each folder.

python examples/autoencoder/reconstructions.py out.png ROWS.jsonl PICTURES.tar FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mlx_transfusion.autoencoder.folder import load_autoencoder
from mlx_transfusion.autoencoder.measures import reconstruct
from mlx_transfusion.images import grid, save_png
from mlx_transfusion.training.pixels import load_pixels
from mlx_transfusion.training.rows import ImageRef, Source, load_rows

COUNT = 12


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    loaded = [load_autoencoder(folder) for folder in args.folders]
    found = load_rows(Source(args.rows, args.images)).rows
    refs = list(dict.fromkeys(one for row in found for one in row.segments if isinstance(one, ImageRef)))
    size = loaded[0].config.sample_size
    pixels = load_pixels(refs[:: max(1, len(refs) // COUNT)][:COUNT], size, size, 1)
    sheet = [*pixels, *(picture for one in loaded for picture in reconstruct(one.model, pixels))]
    doubled = np.repeat(np.repeat(grid(sheet, COUNT), 2, 0), 2, 1)
    save_png(args.output, doubled, {"autoencoders": [one.fingerprint for one in loaded]})


if __name__ == "__main__":
    main()
