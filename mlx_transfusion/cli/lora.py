"""`mlx-transfusion lora`: store a model as a small difference from another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import message, result

app = typer.Typer(no_args_is_help=True, help="Store a model as a small difference from another.")


@app.callback()
def _group() -> None:
    """Store a model as a small difference from another."""
    # A callback keeps `extract` a subcommand: typer folds an app with one command into that command.


@app.command()
def extract(
    base: Annotated[str, typer.Option(metavar="MODEL", help="Where the other one started from.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="The model to store.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the adapter.")],
    rank: Annotated[int, typer.Option(help="Directions kept of the difference of each matrix.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing adapter.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write the difference of two models as a LoRA adapter; prints its folder, which every verb takes as --model.

    The base has to stay where it is: the adapter is added to it whenever it is loaded.
    """
    from mlx_transfusion.lora_extract import extract as run

    made = run(base, model, rank, output, overwrite)
    if as_json:
        result(asdict(made) | {"folder": str(made.folder)})
        return
    message(
        f"rank {rank}: {made.bytes / 1e6:.2f} MB beside {made.model_bytes / 1e6:.2f} MB of the whole model; "
        f"{made.lost:.1%} of the difference is left out"
    )
    result(str(made.folder))
