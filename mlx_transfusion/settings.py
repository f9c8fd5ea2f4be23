"""Generation settings: every default of painting and writing stands here. Imports no numpy and no mlx."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_transfusion.errors import UserError


@dataclass(frozen=True)
class GenerationSettings:
    """How pictures are painted and words are chosen."""

    sampler: str = "dpmpp_2m"
    """A name of `sampling.SAMPLERS`."""
    steps: int | None = None
    """Sampler steps; None means the sampler's own number (`sampling.Sampler.default_steps`)."""
    spacing: str = "uniform"
    """How steps are spaced over the noise angle: a name of `sampling.SPACINGS`."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 is none and costs half (arXiv 2408.11039, section 4: 3 to 5)."""
    guidance_interval: tuple[float, float] = (0.0, math.pi / 2)
    """Noise angles in radians, low and high, between which guidance applies."""
    negative_prompt: str = ""
    """What guidance leads away from, instead of from a picture without any text."""
    batch_size: int = 1
    """Pictures painted at once."""

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

        sampling.get_sampler(self.sampler)
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}: use at least 1")
        sampling.angle_schedule(1, spacing=self.spacing)
        sampling.Guidance(self.guidance, self.guidance_interval)
        for name, least in (("batch_size", 1), ("max_tokens", 1), ("max_images", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: use at least {least}")
        if "" in self.stop:
            raise UserError("a stop text is empty: give at least one character")
        check_settings(self.temperature, self.top_p, self.top_k, 0.0, self.repetition_penalty)
        return self

    @property
    def steps_in_use(self) -> int:
        """`steps`, or the sampler's own number."""
        from mlx_transfusion.sampling import get_sampler

        return get_sampler(self.sampler).default_steps if self.steps is None else self.steps


DEFAULTS = GenerationSettings()
