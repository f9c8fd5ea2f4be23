"""`mlx-transfusion train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli.terminal import result
from mlx_transfusion.errors import UserError

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. optimizer.learning_rate=1e-3. Repeatable.",
    ),
]
Resume = Annotated[
    bool, typer.Option(help="Continue from the output folder's newest checkpoint, when it has one.")
]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration.")],
    overrides: Overrides = None,
    resume: Resume = True,
) -> None:
    """Train a model; prints the folder of its last checkpoint, which every other verb takes as --model."""
    from mlx_transfusion.training.config import load_train_config
    from mlx_transfusion.training.trainer import train as run

    loaded = load_train_config(config, overrides or [])
    if loaded.consistency is not None:
        raise UserError(f"{config}: has a [consistency] table: use the verb distill")
    result(str(run(loaded, resume=resume)))
