"""How a diffusion model paints unless it is told otherwise: the "generation" table of its config.json.

Families come with a sampler of their own: JanusFlow's is Euler on an even grid of flow times, MonoFormer's follows
its DDPM steps. A converter writes that down, so that a converted model paints as its authors had it paint; every flag
still overrides it. Imports no numpy and no mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError

GENERATION = "generation"


@dataclass(frozen=True)
class PaintingDefaults:
    """The table. None leaves the value to the package's default."""

    sampler: str | None = None
    steps: int | None = None
    """Of that sampler; another one has its own number."""
    spacing: str | None = None
    """Of that sampler's steps."""
    guidance: float | None = None


NO_DEFAULTS = PaintingDefaults()


def read_painting_defaults(extra: Mapping[str, Any], model: str) -> PaintingDefaults:
    """The table among the extra tables of config.json (`model_io.Loaded.extra`); empty without one.

    model: a name for messages. Raises UserError for unknown keys, wrong types and values out of range.
    """
    from mlx_transfusion import sampling, trigflow

    where = f"model {model}: config.json: {GENERATION}"
    defaults = from_dict(PaintingDefaults, extra.get(GENERATION, {}), where)
    if defaults.steps is not None and defaults.steps < 1:
        raise UserError(f"{where}.steps is {defaults.steps}: use at least 1")
    if defaults.sampler is not None:
        sampling.get_sampler(defaults.sampler)
    if defaults.spacing is not None:
        sampling.angle_schedule(1, spacing=defaults.spacing)
    if defaults.guidance is not None:
        sampling.Guidance(defaults.guidance, (0.0, trigflow.NOISE_ANGLE))
    return defaults
