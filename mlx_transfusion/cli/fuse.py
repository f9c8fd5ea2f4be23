"""`mlx-transfusion fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import result
from mlx_transfusion.errors import UserError


def fuse(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the new model.")],
    model: options.Model = None,
    adapter: options.Adapter = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Store float weights though the model's are quantised.")
    ] = False,
) -> None:
    """Write a model with its adapters inside as a whole model; prints its folder.

    A quantised model is quantised again in the same way, unless --dequantize. A --model that is an adapter itself
    becomes a whole model.
    """
    from mlx_transfusion.finetune.fuse import fuse as run

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already: name a new folder")
    result(str(run(model, adapter or [], output, dequantize)))
