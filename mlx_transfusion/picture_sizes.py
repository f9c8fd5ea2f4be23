"""Which of several picture sizes a picture belongs to. Sizes are (height, width).

A picture goes to the size that is nearest in aspect, where least of it is cropped: by the |logarithm| of the ratio of
the aspects, so that twice as wide is as far as twice as high. Sizes of the same aspect tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mlx_transfusion.errors import UserError

Size = tuple[int, int]


def parse_size(text: str) -> Size:
    """ "64" or, width first, "64x48" -> (height, width). Raises UserError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise UserError(
            f'"{text}" is no picture size: expected pixels a side, as 64, or WIDTHxHEIGHT, as 64x48'
        )
    width, height = found[1], found[2] or found[1]
    return int(height), int(width)


def nearest(height: int, width: int, sizes: Sequence[Size]) -> list[Size]:
    """The sizes whose aspect is nearest to that of a picture, in their order; several where they have one aspect."""
    aspect = math.log(width / height)
    gaps = [abs(math.log(w / h) - aspect) for h, w in sizes]
    return [size for size, gap in zip(sizes, gaps, strict=True) if gap == min(gaps)]


def best(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """Of those, the largest that the picture fills without being enlarged; the smallest where it fills none.

    A picture that has one of the sizes keeps it.
    """
    tied = sorted(nearest(height, width, sizes))
    filled = [(h, w) for h, w in tied if h <= height and w <= width]
    return filled[-1] if filled else tied[0]


def named(sizes: Sequence[Size]) -> str:
    """ "32x24, 48x48": width first, as people write it."""
    return ", ".join(f"{width}x{height}" for height, width in sizes)
