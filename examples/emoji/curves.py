"""Draw the losses of a training run: python examples/emoji/curves.py runs/emoji/metrics.jsonl curves.png

Grey: every logged step; blue: their running mean; red: validation (EMA weights).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

PANEL, GAP, LEFT, BOTTOM, TOP = (440, 260), 30, 52, 28, 26
PANELS = (("text_loss", "text loss (nats per token)"), ("image_loss", "image loss (mean squared error)"))
GREY, BLUE, RED, BLACK = (205, 205, 205), (40, 90, 200), (210, 50, 40), (60, 60, 60)

Points = list[tuple[float, float]]


def smooth(points: Points, window: int = 15) -> Points:
    """Mean over the last `window` values."""
    out = []
    for i, (x, _) in enumerate(points):
        part = [y for _, y in points[max(0, i - window + 1) : i + 1]]
        out.append((x, sum(part) / len(part)))
    return out


def panel(title: str, train: Points, valid: Points) -> Image.Image:
    """One set of axes."""
    image = Image.new("RGB", (PANEL[0] + LEFT + 10, PANEL[1] + TOP + BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    shown = sorted(y for _, y in train)[: int(len(train) * 0.98)]  # the first steps would flatten all others
    low, high = min([*shown, *(y for _, y in valid)]), max([*shown, *(y for _, y in valid)])
    last = max(x for x, _ in train)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return LEFT + x / last * PANEL[0], TOP + (high - min(y, high)) / (high - low) * PANEL[1]

    draw.text((LEFT, 6), title, BLACK)
    for i in range(5):
        y = low + (high - low) * i / 4
        at = place((0, y))[1]
        draw.line([(LEFT, at), (LEFT + PANEL[0], at)], (235, 235, 235))
        draw.text((4, at - 6), f"{y:.3g}", BLACK)
        draw.text((LEFT + PANEL[0] * i / 4 - 10, TOP + PANEL[1] + 8), f"{last * i / 4:.0f}", BLACK)
    draw.line([place(p) for p in train], GREY)
    draw.line([place(p) for p in smooth(train)], BLUE, 2)
    for point in valid:
        x, y = place(point)
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], RED)
    return image


def main() -> None:
    """Read metrics.jsonl, write a PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.metrics.read_text().splitlines()]
    rows.sort(key=lambda row: row["step"])
    images = [
        panel(
            title,
            [(r["step"], r[key]) for r in rows if key in r],
            [(r["step"], r[f"valid_{key}"]) for r in rows if f"valid_{key}" in r],
        )
        for key, title in PANELS
    ]
    sheet = Image.new("RGB", (sum(i.width for i in images) + GAP, images[0].height), "white")
    sheet.paste(images[0], (0, 0))
    sheet.paste(images[1], (images[0].width + GAP, 0))
    sheet.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
