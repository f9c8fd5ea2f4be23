"""How often is an edit of edits_val.jsonl nearest to the right picture?

    python examples/edit_emoji/evaluate_edits.py MODEL [--guidance S] [--steps N] [--sheet FILE.png]

For each of the 120 edits, whose targets no training row has as a target: the distance (mean squared difference of
pixels) from the output to every variant of its base, that is to the source and to all targets that any edit of
training or validation makes of it. The edit counts when the right one is the nearest. Copying the source is the
baseline; it is also counted with the source left out of the variants, where it can win by luck.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from mlx_transfusion.adapters import load_adapted
from mlx_transfusion.editing import Edit, edit_images
from mlx_transfusion.images import grid, save_png
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.image_store import ImageTar
from mlx_transfusion.training.pixels import decode_image, fit

DATA = Path(__file__).parent / "data"
SIZE, BATCH, SEED, SHOWN = 32, 40, 0, 12


def read_rows(split: str) -> list[dict[str, str]]:
    """The rows of one split."""
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def accuracy(outputs: list[np.ndarray], rows: list[dict[str, str]], pictures: dict[str, np.ndarray],
             variants: dict[str, set[str]], with_source: bool) -> float:  # fmt: skip
    """Share of outputs uint8 [32, 32, 3] that are nearest to their row's target."""
    hits = 0
    for output, row in zip(outputs, rows, strict=True):
        names = sorted(variants[row["source"]] | ({row["source"]} if with_source else set()))
        errors = [float(np.square(output.astype(float) - pictures[name]).mean()) for name in names]
        hits += names[int(np.argmin(errors))] == row["target"]
    return hits / len(rows)


def main() -> None:
    """Print the results as one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--guidance", type=float, help="the model's own if not given")
    parser.add_argument("--image-guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument(
        "--sheet", type=Path, help="Source, output and target of the first dozen, as a picture."
    )
    a = parser.parse_args()
    store, rows = ImageTar(DATA / "pictures.tar"), read_rows("val")
    variants: dict[str, set[str]] = defaultdict(set)
    for row in read_rows("train") + rows:
        variants[row["source"]].add(row["target"])
    names = {n for row in rows for n in variants[row["source"]] | {row["source"]}}
    pictures = {n: fit(decode_image(store.read(n), n), SIZE, SIZE) for n in sorted(names)}
    settings = GenerationSettings(guidance=a.guidance, steps=a.steps, batch_size=BATCH)
    edits = [Edit(pictures[row["source"]], row["instruction"], SEED) for row in rows]
    made = edit_images(load_adapted(a.model, a.adapter), edits, settings, a.image_guidance)
    outputs, sources = [image.pixels for image in made], [pictures[row["source"]] for row in rows]
    targets = [pictures[row["target"]] for row in rows]
    result = {
        "edits": len(rows),
        "variants_mean": float(np.mean([len(variants[row["source"]]) + 1 for row in rows])),
        "guidance": made[0].settings["guidance"],
        "image_guidance": a.image_guidance,
        "sampler": made[0].settings["sampler"],
        "steps": made[0].settings["steps"],
        "nearest_is_target": accuracy(outputs, rows, pictures, variants, True),
        "copy_nearest_is_target": accuracy(sources, rows, pictures, variants, True),
        "copy_without_source_among_variants": accuracy(sources, rows, pictures, variants, False),
        "output_error": _error(outputs, targets),
        "copy_error": _error(sources, targets),
        "seconds_per_edit": sum(image.seconds for image in made) / len(made),
    }
    print(json.dumps(result))
    if a.sheet is not None:
        rows_of = [sources[:SHOWN], outputs[:SHOWN], targets[:SHOWN]]
        sheet = grid([p for line in rows_of for p in line], SHOWN)
        save_png(a.sheet, np.repeat(np.repeat(sheet, 3, 0), 3, 1))


def _error(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Root mean square difference in levels of 0 to 255."""
    return float(np.sqrt(np.mean([np.square(x.astype(float) - y).mean() for x, y in zip(a, b, strict=True)])))


if __name__ == "__main__":
    main()
