"""Draw `data/` beside this file: sixteen pictures of something that no emoji shows, with captions.

    python examples/new_subject/draw.py

The subject is a zorble: a teal drop with one large eye, two horns and yellow feet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, FINE = 96, 4
TEAL, DARK, YELLOW, PINK, WHITE = (
    (20, 176, 160),
    (10, 92, 96),
    (250, 196, 40),
    (236, 110, 160),
    (255, 255, 255),
)
RED, BLUE, GREEN, BLACK = (222, 46, 66), (59, 110, 220), (90, 170, 60), (40, 40, 46)


@dataclass(frozen=True)
class Zorble:
    """One drawing: what stands in its caption and how it differs from the plain one."""

    caption: str
    centre: tuple[float, float] = (48, 50)
    size: float = 1.0
    look: tuple[float, float] = (0, 0)
    """Where the eye looks, in units of its radius."""
    hat: tuple[int, int, int] | None = None
    shut: bool = False
    mouth: str = "smile"
    arms: float = 0.0
    """How far the arms are raised, 0 to 1."""
    extras: tuple[str, ...] = field(default=())


ZORBLES = (
    Zorble("zorble"),
    Zorble("zorble", size=0.97, centre=(49, 49)),
    Zorble("smiling zorble"),
    Zorble("sad zorble", mouth="sad"),
    Zorble("surprised zorble", mouth="open"),
    Zorble("sleeping zorble", shut=True, mouth="none"),
    Zorble("zorble looking left", look=(-0.45, 0)),
    Zorble("zorble looking right", look=(0.45, 0)),
    Zorble("zorble looking up", look=(0, -0.45)),
    Zorble("zorble waving", arms=1.0),
    Zorble("zorble with red hat", hat=RED),
    Zorble("zorble with blue hat", hat=BLUE),
    Zorble("zorble with green hat", hat=GREEN),
    Zorble("small zorble", size=0.62, centre=(48, 60)),
    Zorble("zorble with heart", extras=("heart",), centre=(40, 54), size=0.86),
    Zorble("zorble on grass", extras=("grass",), centre=(48, 46), size=0.9),
)


class Pen:
    """Shapes around the middle of a zorble, in its own units."""

    def __init__(self, draw: ImageDraw.ImageDraw, zorble: Zorble) -> None:
        self._draw, self._z = draw, zorble

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place."""
        z = self._z
        return (z.centre[0] + x * z.size) * FINE, (z.centre[1] + y * z.size) * FINE

    def oval(self, x: float, y: float, w: float, h: float, fill: tuple[int, int, int]) -> None:
        """A filled ellipse of half widths w and h."""
        self._draw.ellipse([self.at(x - w, y - h), self.at(x + w, y + h)], fill=fill)

    def polygon(self, points: list[tuple[float, float]], fill: tuple[int, int, int]) -> None:
        """A filled polygon."""
        self._draw.polygon([self.at(*p) for p in points], fill=fill)

    def arc(self, x: float, y: float, w: float, h: float, start: int, end: int) -> None:
        """A dark arc, degrees clockwise from the right."""
        width = round(3 * FINE * self._z.size)
        self._draw.arc([self.at(x - w, y - h), self.at(x + w, y + h)], start, end, fill=BLACK, width=width)


def paint(zorble: Zorble) -> Image.Image:
    """One picture, SIZE x SIZE on white."""
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), WHITE)
    draw = ImageDraw.Draw(image)
    pen = Pen(draw, zorble)
    if "grass" in zorble.extras:
        draw.rectangle([0, 76 * FINE, SIZE * FINE, SIZE * FINE], fill=GREEN)
    for side in (-1, 1):
        pen.oval(side * 14, 37, 11, 6, YELLOW)
        pen.polygon([(side * 10, -26), (side * 26, -44), (side * 24, -18)], DARK)
        pen.oval(side * 33, 6 - 22 * zorble.arms * (side > 0), 7, 12, TEAL)
    pen.oval(0, 4, 32, 34, TEAL)
    pen.oval(0, 18, 20, 16, (120, 220, 206))
    _face(pen, zorble)
    if zorble.hat is not None:
        pen.polygon([(-20, -26), (20, -26), (0, -48)], zorble.hat)
    if "heart" in zorble.extras:
        for x in (74, 84):
            draw.ellipse([(x - 6) * FINE, 14 * FINE, (x + 6) * FINE, 26 * FINE], fill=RED)
        draw.polygon([(68.5 * FINE, 22 * FINE), (89.5 * FINE, 22 * FINE), (79 * FINE, 36 * FINE)], fill=RED)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _face(pen: Pen, zorble: Zorble) -> None:
    if zorble.shut:
        pen.arc(0, -6, 13, 9, 20, 160)
    else:
        pen.oval(0, -8, 15, 15, WHITE)
        pen.oval(15 * zorble.look[0], -8 + 15 * zorble.look[1], 7, 7, BLACK)
    if zorble.mouth == "smile":
        pen.arc(0, 14, 11, 8, 15, 165)
    elif zorble.mouth == "sad":
        pen.arc(0, 26, 11, 8, 195, 345)
    elif zorble.mouth == "open":
        pen.oval(0, 20, 5, 6, PINK)


def main() -> None:
    """Write data/NN.png and data/NN.txt."""
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    for i, zorble in enumerate(ZORBLES):
        paint(zorble).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(zorble.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
