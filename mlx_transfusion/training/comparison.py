"""Teacher and student side by side: the same prompts on the same noise, one row of pictures for each way to paint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlx_transfusion.images import grid, save_png
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import to_uint8
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import SampleConfig

SCALE = 3


def paint_rows(
    rows: Sequence[tuple[Transfusion, GenerationSettings]],
    tokenizer: Tokenizer,
    config: SampleConfig,
    file: Path,
) -> None:
    """Paint `config.prompts` once for each (model, settings) and write all rows as one PNG."""
    c = rows[0][0].config
    prefixes = [[c.bos_token_id, *tokenizer.encode(p), c.boi_token_id] for p in config.prompts]
    seeds = list(range(config.seed, config.seed + len(prefixes)))
    pictures = [
        picture
        for model, settings in rows
        for picture in to_uint8(model.decode(paint(model, prefixes, seeds, settings)))
    ]
    sheet = grid(pictures, len(prefixes))
    record = {
        "prompts": list(config.prompts),
        "seeds": seeds,
        "rows": [asdict(settings) for _, settings in rows],
    }
    save_png(file, np.repeat(np.repeat(sheet, SCALE, 0), SCALE, 1), record)
