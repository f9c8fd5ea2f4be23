"""Does the subject appear on request, and are the other pictures what they were?

    python examples/new_subject/evaluate_subject.py ADAPTER [--count 200] [--sheet FILE.png]

Every caption of data/ is painted twice, with the adapter and without: how many of the pictures are nearest to a
zorble among the sixteen and all 3,496 pictures of examples/emoji? And `--count` captions of examples/emoji, painted
with the same seeds by both: how many are nearest to their own picture (evaluation/retrieval.py)?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mlx_transfusion.adapters import load_adapted
from mlx_transfusion.evaluation.retrieval import retrieve_pictures
from mlx_transfusion.images import grid, load_pixels, save_png
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images
from mlx_transfusion.training.image_store import ImageTar
from mlx_transfusion.training.pixels import decode_image, fit

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji" / "data" / "emoji"
SIZE, SEEDS, BATCH = 32, 2, 32


def main() -> None:
    """Print the results as one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sheet", type=Path, help="The subject's pictures and what was painted for them.")
    a = parser.parse_args()
    files = sorted((HERE / "data").glob("*.png"))
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    subject = np.stack([load_pixels(file, SIZE, SIZE) for file in files])
    rows = [json.loads(line) for line in (EMOJI / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    store = ImageTar(EMOJI / "train.tar")
    emoji = np.stack([fit(decode_image(store.read(r["image"]), r["image"]), SIZE, SIZE) for r in rows])
    references = np.concatenate([subject, emoji])
    chosen = np.random.default_rng(0).permutation(len(rows))[: a.count]
    settings = GenerationSettings(batch_size=BATCH)
    result: dict[str, object] = {"captions": len(captions), "emoji": len(chosen)}
    sheet = [list(subject)]
    for name, adapters in (("without", []), ("with", [a.adapter])):
        loaded = load_adapted(a.model, adapters)
        seeds = [seed for seed in range(SEEDS) for _ in captions]
        made = np.stack([p.pixels for p in generate_images(loaded, captions * SEEDS, seeds, settings)])
        sheet.append(list(made[: len(captions)]))
        found = retrieve_pictures(
            made, np.tile(np.arange(len(subject)), SEEDS), references, np.arange(len(references))
        )
        others = generate_images(
            loaded, [rows[i]["text"] for i in chosen], list(range(len(chosen))), settings
        )
        kept = retrieve_pictures(np.stack([p.pixels for p in others]), chosen, emoji, np.arange(len(emoji)))
        result[name] = {
            "subject_appears": float((found.nearest < len(subject)).mean()),
            "right_one_of_sixteen": float(found.exact.mean()),
            "emoji_retrieved": float(kept.exact.mean()),
        }
    print(json.dumps(result))
    if a.sheet is not None:
        pixels = grid([p for line in sheet for p in line], len(captions))
        save_png(a.sheet, np.repeat(np.repeat(pixels, 2, 0), 2, 1))


if __name__ == "__main__":
    main()
