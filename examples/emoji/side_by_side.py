"""Teacher and student on the same captions and seeds, each row with the time that a picture took.

    python examples/emoji/side_by_side.py --output docs/two-steps.png

The captions are the first of the contact sheet's shuffle; nothing is picked. Every picture is painted by itself, and
the time, from prompt to pixels, is the median of the row on the machine that runs this.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import numpy as np
from contact_sheet import LINE_HEIGHT, LINES, MARGIN, PICTURE, TEXT_SIZE, enlarged, plain, wrapped
from PIL import Image, ImageDraw, ImageFont

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.evaluation.data import load_pairs, shuffled
from mlx_transfusion.generation import generate_images
from mlx_transfusion.images import save_png
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.settings import GenerationSettings

LABEL = 118
"""Width of the labels in pixels."""
WAYS = {
    "teacher": (
        ("250 steps, guided", GenerationSettings(sampler="ddpm")),
        ("25 steps, guided", GenerationSettings(sampler="dpmpp_2m")),
    ),
    "student": (("2 steps", GenerationSettings()), ("1 step", GenerationSettings(steps=1))),
}
"""How each model paints: a label, and settings."""


def painted(
    loaded: Loaded, captions: Sequence[str], seeds: Sequence[int], settings: GenerationSettings
) -> tuple[list[np.ndarray], float]:
    """Pictures uint8 [H, W, 3], and the median of their seconds; one more is painted before to warm up."""
    generate_images(loaded, captions[0], seeds[0], settings)
    pictures, seconds = [], []
    for caption, seed in zip(captions, seeds, strict=True):
        start = time.perf_counter()
        pictures.append(generate_images(loaded, caption, seed, settings)[0].pixels)
        seconds.append(time.perf_counter() - start)
    return pictures, statistics.median(seconds)


def table(rows: Sequence[tuple[str, Sequence[np.ndarray]]], captions: Sequence[str]) -> Image.Image:
    """One row of pictures for each label, captions beneath."""
    step = PICTURE + 2 * MARGIN
    out = Image.new("RGB", (LABEL + len(captions) * step, len(rows) * step + LINES * LINE_HEIGHT), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(TEXT_SIZE + 2)
    for r, (label, pictures) in enumerate(rows):
        middle = r * step + step / 2
        draw.multiline_text((MARGIN, middle), label, fill=(40, 40, 40), font=font, anchor="lm", spacing=3)
        for i, picture in enumerate(pictures):
            out.paste(enlarged(picture), (LABEL + i * step + MARGIN, r * step + MARGIN))
    small = ImageFont.load_default(TEXT_SIZE)
    for i, caption in enumerate(captions):
        for k, line in enumerate(wrapped(plain(caption), small, step - 4)):
            place = (LABEL + i * step + step / 2, len(rows) * step + k * LINE_HEIGHT)
            draw.text(place, line, fill=(60, 60, 60), font=small, anchor="ma")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="emoji", help="a diffusion model")
    parser.add_argument("--student", default="emoji-2step", help="a consistency model")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("evaluate.toml"))
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("two-steps.png"))
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}: use at least 1")
    config = load_config(arguments.config)
    models = {"teacher": load(arguments.teacher), "student": load(arguments.student)}
    pairs = load_pairs(config, config.train, models["teacher"].transfusion.config)
    chosen = shuffled(len(pairs), config.seed, "contact sheet")[: arguments.count]
    captions, seeds = [pairs.captions[i] for i in chosen], [config.seed + int(i) for i in chosen]
    rows, times = [], {}
    for role, ways in WAYS.items():
        for what, settings in ways:
            pictures, seconds = painted(models[role], captions, seeds, settings)
            rows.append((f"{role},\n{what}:\n{1000 * seconds:.0f} ms", pictures))
            times[f"{role}, {what}"] = seconds
    record = {
        "models": {role: [m.name, m.fingerprint] for role, m in models.items()},
        "captions": captions,
        "seeds": seeds,
        "seconds": times,
    }
    print(save_png(arguments.output, np.asarray(table(rows, captions)), record))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
