"""What a model learnt of each size: the loss of unseen pictures, with their own captions and with another's.

    python examples/picture_sizes/measure_sizes.py MODEL

The error is that of the velocity (1 for a model that always predicts the mean) at angles 0.7 and 1.45, over all
validation pictures, brought to every size in turn, with the same noise for both captions.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion import load, noise, trigflow
from mlx_transfusion.painting import prefill
from mlx_transfusion.training.pixels import load_pixels
from mlx_transfusion.training.rows import ImageRef, Source, load_rows

DATA = Path(__file__).parent / "data"
ANGLES = (0.7, 1.45)


def main(model: str) -> None:
    """Print one line a size."""
    loaded = load(model)
    rows = load_rows(Source(DATA / "val.jsonl", DATA / "val.tar")).rows
    refs = [s for row in rows for s in row.segments if isinstance(s, ImageRef)]
    captions = [s for row in rows for s in row.segments if isinstance(s, str)]
    sizes = loaded.pictures.sizes
    for height, width in (*sizes, (40, 32)):
        view = loaded.at_size(width, height).transfusion
        x0 = view.encode(mx.array(load_pixels(refs, height, width)).astype(mx.float32) / 255)
        z = mx.array(np.stack([noise.normal(0, i, x0.shape[1:], "picture sizes") for i in range(len(refs))]))
        errors = []
        for angle in ANGLES:
            for texts in (captions, captions[len(captions) // 2 :] + captions[: len(captions) // 2]):
                c = view.config
                prefixes = [[c.bos_token_id, *loaded.tokenizer.encode(t), c.boi_token_id] for t in texts]
                v = view.velocity(
                    trigflow.mix(x0, z, angle), mx.full((len(refs),), angle), prefill(view, prefixes)
                )
                errors.append(float((v - trigflow.velocity_target(x0, z, angle)).square().mean()))
        learnt = "" if (height, width) in sizes else " (not learnt)"
        print(f"{width}x{height}{learnt}: " + ", ".join(f"{error:.4f}" for error in errors))


if __name__ == "__main__":
    main(sys.argv[1])
