"""A contact sheet of pictures that nobody picked: the first captions of a seeded shuffle of the data.

    python examples/emoji/contact_sheet.py --output sheet.png --strip strip.png

Every caption is painted once, with the seed and settings of evaluate.toml, and stands beneath its picture.
The strip shows the first of them under their references.
"""

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.evaluation.data import load_pairs, shuffled
from mlx_transfusion.generation import generate_images
from mlx_transfusion.images import save_png
from mlx_transfusion.model_io import load

PICTURE = 96
"""Side of a picture on the sheet in pixels."""
MARGIN = 8
QUOTES = str.maketrans("\u2019\u201c\u201d", '\'""')
LINES, LINE_HEIGHT, TEXT_SIZE = 4, 11, 10


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures uint8 [H, W, 3] in reading order on white, each with its caption beneath."""
    width, height = PICTURE + 2 * MARGIN, PICTURE + 2 * MARGIN + LINES * LINE_HEIGHT
    out = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    draw = ImageDraw.Draw(out)
    font = ImageFont.load_default(TEXT_SIZE)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * width + MARGIN, i // columns * height + MARGIN
        out.paste(enlarged(picture), (x, y))
        for k, line in enumerate(wrapped(plain(caption), font, width - 4)):
            middle = (x + PICTURE / 2, y + PICTURE + 3 + k * LINE_HEIGHT)
            draw.text(middle, line, fill=(60, 60, 60), font=font, anchor="ma")
    return out


def strip(references: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> Image.Image:
    """References above, what the model painted for their captions beneath."""
    step = PICTURE + MARGIN
    out = Image.new("RGB", (len(pictures) * step + MARGIN, 2 * step + MARGIN), "white")
    for row, line in enumerate((references, pictures)):
        for i, picture in enumerate(line):
            out.paste(enlarged(picture), (MARGIN + i * step, MARGIN + row * step))
    return out


def enlarged(picture: np.ndarray) -> Image.Image:
    """At the sheet's size, with hard pixels: smoothing would flatter the model."""
    return Image.fromarray(picture).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)


def plain(text: str) -> str:
    """Without accents and curly quotes: Pillow's own font has neither."""
    letters = unicodedata.normalize("NFKD", text).translate(QUOTES)
    return "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """At most LINES lines that fit the width; what is left out shows as dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1] + " ..."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder; the bundled model without it")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("evaluate.toml"))
    parser.add_argument("--data", help="data folder, instead of the config's")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("contact-sheet.png"))
    parser.add_argument("--strip", type=Path, help="also write references and pictures above each other")
    parser.add_argument("--strip-count", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.columns < 1 or arguments.strip_count < 1:
        raise UserError("--count, --columns and --strip-count must be 1 or more")
    config = load_config(arguments.config, arguments.data)
    loaded = load(arguments.model)
    pairs = load_pairs(
        config, config.val if arguments.split == "val" else config.train, loaded.transfusion.config
    )
    chosen = shuffled(len(pairs), config.seed, "contact sheet")[: arguments.count]
    captions = [pairs.captions[i] for i in chosen]
    made = generate_images(loaded, captions, [config.seed + int(i) for i in chosen], config.generation)
    pictures = [image.pixels for image in made]
    record = {
        "model": loaded.name,
        "model_hash": loaded.fingerprint,
        "split": arguments.split,
        "captions": captions,
        "seeds": [image.seed for image in made],
        "settings": made[0].settings,
    }
    print(save_png(arguments.output, np.asarray(sheet(pictures, captions, arguments.columns)), record))
    if arguments.strip is not None:
        first = chosen[: arguments.strip_count]
        print(
            save_png(arguments.strip, np.asarray(strip(pairs.pixels[first], pictures[: len(first)])), record)
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
