"""What generation tells its caller while it runs; the command line shows it, a server can stream it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture and what repeats it."""

    pixels: np.ndarray
    """uint8 [H, W, C]"""
    prompt: str
    seed: int
    index: int
    """Its number among the pictures that were asked for, or in the document."""
    settings: dict[str, Any]
    """Everything that made it, as recorded in its PNG."""
    seconds: float
    """Time it took; of a batch, the time of the batch divided by its size."""

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries the settings; returns its path. Raises UserError when that fails."""
        from mlx_transfusion.images import save_png

        return save_png(path, self.pixels, self.settings)


@dataclass(frozen=True)
class Token:
    """New text, and the ids it came from: several where only together they make a character."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A finished sampler step of the pictures `indices`, which are painted together."""

    indices: list[int]
    step: int
    """From 1."""
    steps: int
    preview: Callable[[], np.ndarray] = field(repr=False)
    """Computes this step's estimate of the finished pictures, uint8 [B, H, W, C]."""


@dataclass(frozen=True)
class Painted:
    """A picture is finished."""

    image: GeneratedImage


@dataclass(frozen=True)
class Finished:
    """The end: "stop" by the model or by a stop text, "length" when the budget or the room is used up."""

    reason: Literal["stop", "length"]


Event = Token | Step | Painted | Finished
