"""The grid of sample pictures painted during training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_transfusion.images import grid, save_png
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.text_to_image import to_uint8
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import SampleConfig

COLUMNS, SCALE = 6, 3


def paint_grid(
    model: PictureFamily,
    tokenizer: Tokenizer,
    config: SampleConfig,
    file: Path,
    settings: GenerationSettings = DEFAULTS,
) -> None:
    """Paint `config.prompts`, seeds counting up, and write them as one PNG.

    settings: for a consistency model those of `GenerationSettings.for_model`; the default paints with a
    diffusion model. Raises UserError for bad settings.
    """
    prefixes = [model.image_prefix(tokenizer.encode(model.prompt_text(p))) for p in config.prompts]
    seeds = list(range(config.seed, config.seed + len(prefixes)))
    pictures = to_uint8(model.decode(paint(model, prefixes, seeds, settings)))
    sheet = grid(list(pictures), COLUMNS)
    record = {"prompts": list(config.prompts), "seeds": seeds}
    save_png(file, np.repeat(np.repeat(sheet, SCALE, 0), SCALE, 1), record)
