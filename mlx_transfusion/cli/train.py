"""`mlx-transfusion train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
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
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows",
        help="Leave out rows of data that cannot be used, and count them, instead of stopping.",
    ),
]
Resume = Annotated[
    bool, typer.Option(help="Continue from the output folder's newest checkpoint, when it has one.")
]


def with_flags(
    overrides: list[str] | None, skip_bad_rows: bool, cache_limit: float | None = None
) -> list[str]:
    """The overrides of --set and of the flags that stand for one."""
    bad = ["data.skip_bad_rows=true"] if skip_bad_rows else []
    limit = [] if cache_limit is None else [f"cache_limit={cache_limit}"]
    return [*(overrides or []), *bad, *limit]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration.")],
    overrides: Overrides = None,
    skip_bad_rows: SkipBadRows = False,
    cache_limit: options.CacheLimit = None,
    resume: Resume = True,
) -> None:
    """Train a model; prints the folder of its last checkpoint, which every other verb takes as --model."""
    from mlx_transfusion.training.config import load_train_config
    from mlx_transfusion.training.trainer import train as run

    loaded = load_train_config(config, with_flags(overrides, skip_bad_rows, cache_limit))
    if loaded.consistency is not None:
        raise UserError(f"{config}: has a [consistency] table: use the verb distill")
    result(str(run(loaded, resume=resume)))
