"""`mlx-transfusion distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import result
from mlx_transfusion.cli.train import Overrides, Resume, SkipBadRows, with_flags
from mlx_transfusion.errors import UserError


def distill(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration with a [consistency] table.")
    ],
    overrides: Overrides = None,
    skip_bad_rows: SkipBadRows = False,
    cache_limit: options.CacheLimit = None,
    resume: Resume = True,
) -> None:
    """Distil a diffusion model into one that paints in one or two steps; prints its last checkpoint."""
    from mlx_transfusion.training.config import load_train_config
    from mlx_transfusion.training.trainer import train as run

    loaded = load_train_config(config, with_flags(overrides, skip_bad_rows, cache_limit))
    if loaded.consistency is None:
        raise UserError(
            f"{config}: has no [consistency] table: add one, or use the verb train for a diffusion model"
        )
    result(str(run(loaded, resume=resume)))
