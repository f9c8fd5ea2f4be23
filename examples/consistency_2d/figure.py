"""The picture of the example: points as scatter plots, training as curves. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

PANEL, GAP, TITLE, LEFT, RIGHT, BOTTOM = 230, 10, 18, 44, 20, 22
SPAN = 2.4
"""Half the width of what a scatter plot shows, in data units."""
GREY, BLUE, BLACK, RULE = (200, 200, 200), (40, 90, 200), (50, 50, 50), (235, 235, 235)
COLOURS = (
    (40, 90, 200), (220, 120, 20), (150, 70, 190), (30, 150, 60), (120, 80, 60),
    (210, 40, 40), (230, 140, 160), (20, 160, 180), (150, 150, 20), (60, 60, 60),
)  # fmt: skip

Curve = Sequence[tuple[float, float]]


def scatter(title: str, points: np.ndarray, paths: np.ndarray | None = None) -> Image.Image:
    """Points [n, 2]; with `paths` [T, m, 2], the ways of m of them below."""
    plot = Image.new("RGB", (PANEL, PANEL), "white")
    draw = ImageDraw.Draw(plot)

    def place(p: np.ndarray) -> np.ndarray:
        """Data units -> pixels; what lies outside lands outside."""
        return (np.clip(p, -9, 9) * [1, -1] / SPAN + 1) * PANEL / 2

    for way in [] if paths is None else place(paths).transpose(1, 0, 2):
        draw.line([tuple(xy) for xy in way], GREY)
    for x, y in place(points):
        draw.ellipse([x - 1, y - 1, x + 1, y + 1], BLUE)
    draw.rectangle([0, 0, PANEL - 1, PANEL - 1], outline=GREY)
    image = Image.new("RGB", (PANEL, PANEL + TITLE), "white")
    image.paste(plot, (0, TITLE))
    ImageDraw.Draw(image).text((4, 3), title, BLACK)
    return image


def curves(title: str, lines: Mapping[str, Curve], low: float, high: float, width: int) -> Image.Image:
    """Curves over training steps; the vertical axis is logarithmic and cut to [low, high]."""
    image = Image.new("RGB", (width, PANEL + TITLE + BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 3), title, BLACK)
    last = max(step for line in lines.values() for step, _ in line)
    across = width - LEFT - RIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        value = min(max(value, low), high) if math.isfinite(value) else high
        share = math.log(value / low) / math.log(high / low)
        return LEFT + step / last * across, TITLE + PANEL - share * PANEL

    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = place(0, 10.0**power)[1]
        draw.line([(LEFT, y), (width - RIGHT, y)], RULE)
        draw.text((4, y - 6), f"{10.0**power:g}", BLACK)
    for i in range(5):
        draw.text((LEFT + across * i / 4 - 10, TITLE + PANEL + 6), f"{last * i / 4:.0f}", BLACK)
    for line, colour in zip(lines.values(), COLOURS, strict=False):
        draw.line([place(*point) for point in line], colour, 2)
    return image


def legend(names: Sequence[str], width: int) -> Image.Image:
    """The colours of the curves."""
    image = Image.new("RGB", (width, PANEL + TITLE + BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        y = TITLE + 10 + 22 * i
        draw.rectangle([4, y + 2, 20, y + 8], colour)
        draw.text((28, y - 1), name, BLACK)
    return image


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images on white, in few colours so that the file stays small."""
    width = max(sum(i.width + GAP for i in row) for row in rows) + GAP
    image = Image.new("RGB", (width, sum(row[0].height + GAP for row in rows) + GAP), "white")
    y = GAP
    for row in rows:
        x = GAP
        for one in row:
            image.paste(one, (x, y))
            x += one.width + GAP
        y += row[0].height + GAP
    return image.quantize(64)
