"""`mlx-transfusion train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli.terminal import result


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key, e.g. optimizer.learning_rate=1e-3. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the output folder's newest checkpoint, when it has one.")
    ] = True,
) -> None:
    """Train a model; prints the folder of its last checkpoint, which every other verb takes as --model."""
    from mlx_transfusion.training.config import load_train_config
    from mlx_transfusion.training.trainer import train as run

    result(str(run(load_train_config(config, overrides or []), resume=resume)))
