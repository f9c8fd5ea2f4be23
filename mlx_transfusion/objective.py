"""What a model was trained to output: a diffusion velocity, a consistency function, or a picture's tokens.

Of the first two config.json tells, for both have the same layers and the same `velocity(x, angle, cache)`. Of a
diffusion model it is the mean velocity at that angle, and many small steps follow it. Of a consistency model it is
the network F of sCM (arXiv 2410.11081, section 3): cos(a) x - sin(a) F is the end of the whole path, so one step
follows it. The numbers of one are nonsense in a sampler of the other, hence the record. That a model writes its
pictures as tokens follows from its family and is added when config.json is read (model_io.py).
Imports no numpy and no mlx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError

DIFFUSION, CONSISTENCY, TOKENS = "diffusion", "consistency", "tokens"
"""The names of the objectives; the second and third are also those of the samplers that such models need."""


@dataclass(frozen=True)
class Objective:
    """The "objective" table of config.json as far as painting needs it; a model without one is diffusion."""

    name: str = DIFFUSION
    method: str | None = None
    """How it was trained, e.g. "scd" (distilled) or "sct" (without a teacher)."""
    teacher: str | None = None
    """Fingerprint of the teacher's weights."""
    guidance: float | None = None
    """Guidance scale of the teacher that was learned; None and 1 are none. With a range, the default of it."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest scale that was learned, of a model that is told the scale."""
    angles: tuple[float, ...] | None = None
    """Its middle angles in radians; None means those of the sampler."""
    codes: int = 0
    """Tokens of a picture, of a model that writes them."""

    @property
    def consistency(self) -> bool:
        """Whether it is a consistency model."""
        return self.name == CONSISTENCY

    @property
    def tokens(self) -> bool:
        """Whether it writes its pictures as tokens."""
        return self.name == TOKENS

    @property
    def guidance_inside(self) -> bool:
        """Whether one pass already paints a guided picture."""
        return self.consistency and (self.guidance_range is not None or self.guidance not in (None, 1.0))


def check_guidance_range(low: float, high: float, guidance: float | None, where: str) -> None:
    """Raises UserError unless 0 <= low < high and the default scale lies between them."""
    if not 0 <= low < high < math.inf:
        raise UserError(
            f"{where}guidance_range is [{low:g}, {high:g}]: use two numbers of 0 or more, the lower one first"
        )
    if guidance is None or not low <= guidance <= high:
        scale = "missing" if guidance is None else f"{guidance:g}"
        raise UserError(
            f"{where}guidance is {scale}: with guidance_range [{low:g}, {high:g}] it is the default scale, "
            f"choose one from {low:g} to {high:g}"
        )


def read_objective(extra: Mapping[str, Any], model: str) -> Objective:
    """The objective among the extra tables of config.json (`model_io.Loaded.extra`).

    model: a name for messages. Keys that painting does not need are left alone. Raises UserError for an
    objective that is unknown and for values of a wrong type or out of range.
    """
    table, where = extra.get("objective", {}), f"model {model}: config.json: objective"
    if isinstance(table, Mapping):
        known = {f.name for f in fields(Objective)}
        table = {key: value for key, value in table.items() if key in known}
    objective = from_dict(Objective, table, where)
    if objective.name not in (DIFFUSION, CONSISTENCY, TOKENS):
        raise UserError(
            f'{where}.name is "{objective.name}": expected "{DIFFUSION}", "{CONSISTENCY}" or "{TOKENS}"'
        )
    if objective.angles is not None:
        from mlx_transfusion.sampling import check_middle_angles

        check_middle_angles(objective.angles, f"{where}.angles")
    if objective.guidance_range is not None:
        check_guidance_range(*objective.guidance_range, objective.guidance, f"{where}.")
    return objective
