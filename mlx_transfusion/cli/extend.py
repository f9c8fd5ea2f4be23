"""`mlx-transfusion extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli.terminal import result
from mlx_transfusion.errors import UserError


def extend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A language model of type llama.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New model folder.")],
    image_size: Annotated[int, typer.Option(help="Height and width of pictures in pixels.")] = 32,
    patch_size: Annotated[int, typer.Option(help="Pixels on a side of what one token holds.")] = 8,
    rank: Annotated[
        int,
        typer.Option(
            metavar="N", help="Low-rank factors beside the text's layers; 0: copies of the layers (experts)."
        ),
    ] = 0,
    every: Annotated[
        int, typer.Option(metavar="N", help="One layer for pictures for N of the text's layers.")
    ] = 1,
    image_mean: Annotated[
        str, typer.Option(metavar="R,G,B", help="Mean colour of the pictures to learn, from -1 to 1.")
    ] = "0,0,0",
    image_std: Annotated[float, typer.Option(help="Their standard deviation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
) -> None:
    """Give a language model a picture side, which `train` then teaches to paint; prints the new folder.

    Its text stays what it was, bit for bit: the weights that read and write are not trained.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already: name a new folder")
    try:
        mean = tuple(float(part) for part in image_mean.split(","))
    except ValueError as error:
        raise UserError(f'--image-mean "{image_mean}": expected three numbers such as 0.6,0.5,0.4') from error
    from mlx_transfusion.picture_side import PictureOptions
    from mlx_transfusion.picture_side import extend as run

    options = PictureOptions(image_size, patch_size, rank, every, mean, image_std, seed)
    result(str(run(model, output, options)))
