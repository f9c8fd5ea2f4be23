"""`mlx-transfusion plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import result
from mlx_transfusion.cli.train import Overrides


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100, h200 or b200.")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' operations that the model gets.")] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Dollars a GPU and hour (default: a rough one of the kind).")
    ] = None,
    caption: Annotated[int, typer.Option(help="Tokens of a caption.")] = 32,
    replicas: Annotated[int, typer.Option(help="Copies of the sharded model.")] = 1,
    tensor: Annotated[int, typer.Option(help="GPUs that share every block (tensor parallelism).")] = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Also shard the real model over fake processes and count (needs PyTorch)."
        ),
    ] = False,
    overrides: Overrides = None,
    as_json: options.Json = False,
) -> None:
    """Memory, operations, time and cost of a training run on GPUs (docs/full_scale.md), before it is started."""
    from mlx_transfusion.torch import plan as planning
    from mlx_transfusion.training.config import load_train_config

    loaded = load_train_config(config, overrides or [])
    given = planning.Assumptions(gpus, gpu, mfu, price, caption, replicas=replicas, tensor=tensor)
    figures = planning.plan(loaded, given)
    rows = planning.table(figures, given)
    if dry_run:
        figures["dry_run"] = counted = _count(loaded, given)
        rows += [(f"counted on fake process 0 of {gpus}: {k}", f"{v:,}") for k, v in counted.items()]
    if as_json:
        result(json.dumps(figures))
        return
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        result(f"{name:<{width}}  {value}")


def _count(loaded: object, given: object) -> dict[str, int]:
    from mlx_transfusion.errors import UserError
    from mlx_transfusion.torch.plan import Assumptions, model_of
    from mlx_transfusion.training.config import TrainConfig

    assert isinstance(loaded, TrainConfig)
    assert isinstance(given, Assumptions)
    try:
        from mlx_transfusion.torch.dry_run import dry_run
    except ImportError as error:
        raise UserError("--dry-run needs PyTorch: pip install 'mlx-transfusion[torch]'") from error
    return dry_run(model_of(loaded), given.gpus, loaded.dtype, given.replicas, tensor=given.tensor)
