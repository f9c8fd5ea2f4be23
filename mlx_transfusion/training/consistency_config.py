"""The [consistency] table of a training config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.objective import CONSISTENCY, check_guidance_range

_LARGEST_SHRINKAGE = 4096


@dataclass(frozen=True)
class ConsistencyConfig:
    """A consistency model instead of a diffusion model: `distill`. Sections are those of arXiv 2410.11081."""

    method: str = "scm"
    """"scm" (continuous time, arXiv 2410.11081), "ect" (two points of a trajectory, arXiv 2406.14548), or "scm_hops"
    ("scm" below an angle, hops of a fixed angle along the teacher's trajectory above it)."""
    teacher: str | None = None
    """A diffusion model to distil, which the student also starts from; None trains on the data alone."""
    guidance: float = 3.0
    """Guidance scale of the teacher, which the student learns to paint with in one pass; 1 is none. With a
    `guidance_range`, the scale that the student is compared at and paints with unless told otherwise."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest scale: every picture is distilled with a scale of its own from this range, which the
    student is told (section 5), so that it can be chosen when painting. None: `guidance` alone."""
    student: str = "full"
    """"full": the student is a model of its own, and the text loss stays in the objective. "painter": it is the
    teacher with a second set of weights for pictures that are being painted (`ModelConfig.painter`), and only these
    are trained."""
    text: str = "data"
    """What the text of a full student is compared with: "data", the next tokens, or "teacher", the teacher's
    distribution of each (arXiv 1503.02531), which holds text where the teacher has it."""
    tangent: str = "normalize"
    """"normalize" (to unit length; "ect": pseudo-Huber loss), "clip" (to [-1, 1]) or "none" (section 4.2)."""
    tangent_constant: float = 0.1
    """c of g / (|g| + c), with |g| the root mean square. Tangents well below it are left small: near pi/2, where g
    holds a factor cos(angle), a large c would leave nothing to learn from."""
    tangent_warmup: int = 200
    """Steps over which the unstable part of the tangent is faded in; 0 has all of it at once. Not for "ect"."""
    anchor_below: float = 0.0
    """Angle in radians below which r is 0, so that F stays the velocity: f then ends where the posterior mean of a
    picture at this angle lies, as samplers end with one denoising step, and not in a teacher's last fine noise. Not
    for "ect"."""
    hops_above: float = 0.9
    """Angle in radians from which "scm_hops" hops."""
    hop: float = 0.25
    """Length of a hop in radians. "scm_hops" alone."""
    gap_stages: int = 8
    """Equal parts of the run at whose ends the gap between both points shrinks. "ect" alone, as the next."""
    gap_factor: float = 2.0
    """By how much it shrinks, from 1/gap_factor in the first stage on."""
    adaptive_weight: bool = False
    """Learn the weight w(angle) of the loss beside the model (section 4.2). On in the paper; off here, because beside
    a tangent normalised by its root mean square it can grow without end near pi/2 (docs/consistency.md)."""
    angles: tuple[float, ...] = (1.1,)
    """Where the student paints again after its first step, radians: the paper's two-step sampler."""
    valid_pictures: int = 32
    """Pictures whose one- and two-step versions are compared with the teacher's at every validation."""

    def __post_init__(self) -> None:
        if self.method == "scm_hops" and self.teacher is None:
            raise UserError(
                'training config: consistency.method "scm_hops" hops along a teacher\'s trajectory: name a teacher, '
                'or use "scm" or "ect"'
            )
        if self.text == "teacher" and (self.teacher is None or self.student != "full"):
            raise UserError(
                'training config: consistency.text "teacher" is for a full student of a teacher: name a teacher and '
                'leave student "full", or use text "data"'
            )
        if self.guidance_range is not None:
            where = "training config: consistency."
            check_guidance_range(*self.guidance_range, self.guidance, where)
            if self.teacher is None:
                raise UserError(f"{where}guidance_range needs a teacher to guide: name one, or leave it out")
        smallest = self.gap_factor**self.gap_stages
        if smallest > _LARGEST_SHRINKAGE:
            raise UserError(
                f"training config: consistency.gap_factor {self.gap_factor} to the power of gap_stages "
                f"{self.gap_stages} is {smallest:.4g}, expected at most {_LARGEST_SHRINKAGE}: a smaller gap is "
                "lost in float32"
            )

    def objective(self, teacher: str | None) -> dict[str, Any]:
        """The "objective" table of a student's config.json. teacher: fingerprint of its weights, None without one."""
        continuous = "sct" if teacher is None else "scd"
        table: dict[str, Any] = {
            "name": CONSISTENCY,
            "method": continuous if self.method == "scm" else self.method,
            "teacher": teacher,
            "guidance": 1.0 if teacher is None else self.guidance,
            "angles": list(self.angles),
        }
        if self.guidance_range is not None:
            table["guidance_range"] = list(self.guidance_range)
        return table
