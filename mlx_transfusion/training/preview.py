"""The grid of sample pictures painted during training."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_transfusion import generation
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import SampleConfig

COLUMNS, SCALE = 6, 3


def paint_grid(model: Transfusion, tokenizer: Tokenizer, config: SampleConfig, file: Path) -> None:
    """Paint `config.prompts` with the default sampler and write them as one PNG of COLUMNS columns."""
    c = model.config
    prefixes = [[c.bos_token_id, *tokenizer.encode(p), c.boi_token_id] for p in config.prompts]
    seeds = list(range(config.seed, config.seed + len(prefixes)))
    patches = generation.paint(model, prefixes, seeds)
    pixels = np.array((model.decode(patches) * 255).round().astype(mx.uint8))
    rows = -(-len(pixels) // COLUMNS)
    grid = np.full((rows * c.image_height, COLUMNS * c.image_width, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = divmod(i, COLUMNS)
        grid[y * c.image_height : (y + 1) * c.image_height, x * c.image_width : (x + 1) * c.image_width] = picture
    image = Image.fromarray(grid).resize((grid.shape[1] * SCALE, grid.shape[0] * SCALE), Image.Resampling.NEAREST)
    image.save(file)
