"""Generation settings: every default of painting and writing stands here. Imports no numpy and no mlx.

What depends on the model is None until `GenerationSettings.for_model` has put the model's own value there;
painting and the records in pictures take `ResolvedSettings` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.objective import CONSISTENCY, TOKENS, Objective, read_objective
from mlx_transfusion.painting_defaults import NO_DEFAULTS, PaintingDefaults, read_painting_defaults

DIFFUSION_SAMPLER = "dpmpp_2m"
DIFFUSION_GUIDANCE = 3.0
DIFFUSION_SPACING = "uniform"
CONSISTENCY_GUIDANCE = 1.0
"""No second pass: what guidance gives is learned in distillation."""


@dataclass(frozen=True)
class GenerationSettings:
    """How pictures are painted and words are chosen."""

    sampler: str | None = None
    """A name of `sampling.SAMPLERS`. None: the model's own (`PaintingDefaults`), DIFFUSION_SAMPLER, or "consistency"
    of a consistency model."""
    steps: int | None = None
    """Sampler steps; None means the sampler's own number (`sampling.Sampler.default_steps`)."""
    angles: tuple[float, ...] | None = None
    """Of the consistency sampler: the angles in radians, decreasing, of the steps after the first, so their
    number sets that of the steps. None: the model's own, else `sampling.middle_angles`."""
    spacing: str | None = None
    """How a diffusion sampler's steps are spaced over the noise angle: a name of `sampling.SPACINGS`. None: the
    model's own, else DIFFUSION_SPACING."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none and costs half (arXiv 2408.11039, section 4: 3 to 5). None:
    DIFFUSION_GUIDANCE, or CONSISTENCY_GUIDANCE with the consistency sampler. A consistency model with a
    `guidance_range` paints with any scale of it at the same cost; None is its own."""
    guidance_interval: tuple[float, float] = (0.0, math.pi / 2)
    """Noise angles in radians, low and high, between which guidance applies."""
    negative_prompt: str = ""
    """What guidance leads away from, instead of from a picture without any text."""
    batch_size: int = 1
    """Pictures painted at once."""
    image_temperature: float = 1.0
    """Of a picture's tokens, in a model that writes them (`temperature` and the next ones are those of text)."""
    image_top_p: float = 1.0
    image_top_k: int = 0

    temperature: float = 0.0
    """Of text tokens; 0 always takes the likeliest."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the text so far less likely."""
    max_tokens: int = 128
    """Longest text written; a picture does not count."""
    max_images: int = 4
    """Most pictures that one completion paints; afterwards it can only write."""
    stop: tuple[str, ...] = ()
    """Texts that end the writing; they are not part of the result."""

    def check(self) -> GenerationSettings:
        """Returns these settings. Raises UserError for the first one out of range."""
        from mlx_transfusion import sampling
        from mlx_transfusion.token_sampling import check_settings

        if self.sampler not in (None, TOKENS):
            sampling.get_sampler(self.sampler)
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}: use at least 1")
        sampling.angle_schedule(1, spacing=self.spacing or DIFFUSION_SPACING)
        self._check_angles()
        sampling.Guidance(1.0 if self.guidance is None else self.guidance, self.guidance_interval)
        for name, least in (("batch_size", 1), ("max_tokens", 1), ("max_images", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: use at least {least}")
        if "" in self.stop:
            raise UserError("a stop text is empty: give at least one character")
        check_settings(self.temperature, self.top_p, self.top_k, 0.0, self.repetition_penalty)
        check_settings(self.image_temperature, self.image_top_p, self.image_top_k)
        return self

    def _check_angles(self) -> None:
        from mlx_transfusion.sampling import check_middle_angles

        if self.sampler == CONSISTENCY and self.spacing not in (None, DIFFUSION_SPACING):
            raise UserError(
                f"spacing '{self.spacing}' is for diffusion samplers: set the angles of the consistency "
                f"sampler instead, e.g. 1.1,0.6"
            )
        if self.angles is None:
            return
        if self.sampler not in (None, CONSISTENCY):
            raise UserError(
                f"angles are for sampler 'consistency', this is '{self.sampler}': leave one of them out"
            )
        check_middle_angles(self.angles, "angles")
        if self.steps not in (None, 1 + len(self.angles)):
            raise UserError(
                f"{len(self.angles)} angles make {1 + len(self.angles)} steps, and steps is {self.steps}: "
                f"give angles or steps, not both"
            )

    def for_model(self, extra: Mapping[str, Any], model: str) -> ResolvedSettings:
        """These settings with the model's own values in place of None. The one place where a model decides.

        extra: the extra tables of its config.json (`model_io.Loaded.extra`); model: its name, for messages.
        Raises UserError for settings out of range and for those that the model cannot paint with: a sampler
        of the other kind, guidance on top of guidance that is baked in, and a scale that it has not learned.
        """
        objective = read_objective(extra, model)
        self._check_tokens(objective, model)
        if objective.consistency:
            self._check_consistency(objective, model)
        elif self.sampler == CONSISTENCY or self.angles is not None:
            what = "the consistency sampler needs" if self.sampler == CONSISTENCY else "angles are for"
            raise UserError(
                f"model {model} is a diffusion model, and {what} a consistency model: leave it out, or name "
                f"a consistency model"
            )
        return self.resolve(objective, read_painting_defaults(extra, model))

    def _check_tokens(self, objective: Objective, model: str) -> None:
        """What belongs to denoising has no place where a picture is written, and the other way round."""
        if not objective.tokens:
            if self.sampler == TOKENS or any(
                getattr(self, n) != getattr(DEFAULTS, n) for n in TOKEN_SETTINGS
            ):
                raise UserError(
                    f"model {model} denoises its pictures, and sampler '{TOKENS}', image_temperature, image_top_p "
                    f"and image_top_k are for one that writes them as tokens: leave them out"
                )
            return
        for name, own in (("sampler", TOKENS), ("steps", objective.codes), ("spacing", DIFFUSION_SPACING),
                          ("angles", None), ("guidance_interval", DEFAULTS.guidance_interval)):  # fmt: skip
            if (given := getattr(self, name)) not in (None, own):
                raise UserError(
                    f"model {model} writes a picture as {objective.codes} tokens, and {name} {given} is for "
                    f"denoising: leave it out"
                )

    def _check_consistency(self, objective: Objective, model: str) -> None:
        if self.sampler not in (None, CONSISTENCY):
            raise UserError(
                f"model {model} is a consistency model and does not give the diffusion velocity that sampler "
                f"'{self.sampler}' needs: use sampler '{CONSISTENCY}' or leave it out"
            )
        if objective.guidance_range is not None:
            self._check_learned_scale(*objective.guidance_range, model)
        elif self.guidance not in (None, 1.0) and objective.guidance_inside:
            raise UserError(
                f"model {model} has guidance {objective.guidance:g} baked in, and guidance {self.guidance:g} "
                f"cannot come on top: leave it out"
            )
        one_pass = self.guidance in (None, 1.0) or objective.guidance_range is not None
        if one_pass and self.negative_prompt.strip():
            raise UserError(
                f"model {model} paints without a second pass for guidance, and so without a negative prompt: "
                f"leave it out"
            )

    def _check_learned_scale(self, low: float, high: float, model: str) -> None:
        if self.guidance is not None and not low <= self.guidance <= high:
            raise UserError(
                f"model {model} has learned guidance {low:g} to {high:g}, and guidance {self.guidance:g} is "
                f"outside: choose one inside, or leave it out"
            )
        if self.guidance_interval != DEFAULTS.guidance_interval:
            raise UserError(
                f"model {model} paints without a second pass for guidance, which then has no interval of "
                f"angles: leave it out"
            )

    def resolve(
        self, objective: Objective | None = None, model: PaintingDefaults = NO_DEFAULTS
    ) -> ResolvedSettings:
        """No None left, without asking whether it all suits the model: for a model without a config.json.

        objective: None is diffusion. model: a diffusion model's own values. Raises UserError for settings out of
        range.
        """
        from mlx_transfusion.sampling import get_sampler

        self.check()
        objective = objective or Objective()
        own = objective.name
        if not (objective.consistency or objective.tokens):
            own = model.sampler or DIFFUSION_SAMPLER
        sampler = own if self.sampler is None else self.sampler
        consistency = sampler == CONSISTENCY
        if consistency or sampler != own:
            model = PaintingDefaults(guidance=None if consistency else model.guidance)
        angles = self._middle_angles(objective) if consistency else self.angles
        steps = self.steps or model.steps
        if steps is None:
            steps = objective.codes or 1 if sampler == TOKENS else get_sampler(sampler).default_steps
        usual = CONSISTENCY_GUIDANCE if consistency else DIFFUSION_GUIDANCE
        guidance = usual if model.guidance is None else model.guidance
        if objective.guidance_range is not None and objective.guidance is not None:
            guidance = objective.guidance
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "sampler": sampler,
            "steps": steps if angles is None else 1 + len(angles),
            "angles": angles,
            "spacing": self.spacing or model.spacing or DIFFUSION_SPACING,
            "guidance": guidance if self.guidance is None else self.guidance,
        }
        resolved = ResolvedSettings(**values)
        resolved.check()
        return resolved

    def _middle_angles(self, objective: Objective) -> tuple[float, ...]:
        """Those asked for, the model's own where they make as many steps, or the sampler's rule."""
        from mlx_transfusion.sampling import MIDDLE_ANGLE, get_sampler, middle_angles

        own = objective.angles
        if self.angles is not None:
            return tuple(self.angles)
        if own is not None and self.steps in (None, 1 + len(own)):
            return own
        steps = self.steps or get_sampler(CONSISTENCY).default_steps
        return middle_angles(steps, own[0] if own else MIDDLE_ANGLE)


@dataclass(frozen=True)
class ResolvedSettings(GenerationSettings):
    """Settings for one model, of `GenerationSettings.for_model` or `resolve`: nothing is left to a default.

    `angles` is a tuple with the consistency sampler and None with all others.
    """

    sampler: str = DIFFUSION_SAMPLER
    steps: int = 1
    spacing: str = DIFFUSION_SPACING
    guidance: float = DIFFUSION_GUIDANCE


TOKEN_SETTINGS = ("image_temperature", "image_top_p", "image_top_k")
"""Those of a picture that is written."""

DEFAULTS = GenerationSettings()
