"""Models that paint captions for a comparison of sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.array_file import ArrayFile, array_name, chunks
from mlx_transfusion.evaluation.config import EvaluationConfig
from mlx_transfusion.evaluation.measures import Progress
from mlx_transfusion.evaluation.report import settings_for
from mlx_transfusion.events import Step
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.settings import TOKEN_SETTINGS, ResolvedSettings
from mlx_transfusion.text_to_image import generate_images


@dataclass(frozen=True)
class Painter:
    """A model and how it paints."""

    role: str
    """"model", or "compared" for the one it is compared with."""
    loaded: Loaded
    settings: ResolvedSettings

    def paint(
        self, captions: Sequence[str], seeds: Sequence[int], kept: ArrayFile, progress: Progress
    ) -> np.ndarray:
        """A picture of each caption, painted or as it was kept: uint8 [Q, H, W, 3]."""
        parts = []
        for rows in chunks(len(captions)):
            work = partial(self._paint, captions, seeds, rows, progress)
            parts.append(kept.get(self._name(captions[rows], seeds[rows]), work))
        return np.concatenate(parts)

    def _paint(
        self, captions: Sequence[str], seeds: Sequence[int], rows: slice, progress: Progress
    ) -> np.ndarray:
        """The pictures of some rows; progress counts all."""
        done = rows.start * self.settings.steps

        def on_step(step: Step) -> None:
            nonlocal done
            done += len(step.indices)
            progress(done, len(captions) * self.settings.steps)

        made = generate_images(self.loaded, captions[rows], seeds[rows], self.settings, on_step)
        return np.stack([image.pixels for image in made])

    def _name(self, captions: Sequence[str], seeds: Sequence[int]) -> str:
        """What decides the pictures, for the file that keeps them."""
        from mlx_transfusion import __version__

        s = self.settings
        facts = {
            "version": __version__,
            "model": self.loaded.fingerprint,
            "captions": list(captions),
            "seeds": list(seeds),
            "settings": [s.sampler, s.steps, s.angles, s.spacing, s.guidance, s.guidance_interval,
                         s.negative_prompt, s.batch_size, *(getattr(s, name) for name in TOKEN_SETTINGS)],
        }  # fmt: skip
        return array_name("pictures", facts)


def load_painters(
    model: str | os.PathLike[str] | None,
    compare: str | os.PathLike[str] | None,
    config: EvaluationConfig,
    quick: bool,
) -> list[Painter]:
    """The model with the config's settings, and behind it the one it is compared with, if any.

    Raises UserError for models that cannot be loaded or painted with, and two of different picture sizes.
    """
    loaded = load(model)
    painters = [Painter("model", loaded, settings_for(loaded, config.generation, quick))]
    if compare is not None:
        other = load(compare)
        painters.append(Painter("compared", other, settings_for(other, config.compare.generation, quick)))
        first, second = (p.loaded.pictures.picture_size for p in painters)
        if first != second:
            raise UserError(
                f"model {loaded.name} paints {first[0]} x {first[1]} pixels and model {other.name} "
                f"{second[0]} x {second[1]}: compare models of one size"
            )
    return painters
