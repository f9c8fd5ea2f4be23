"""`mlx-transfusion shards`: data of large runs, packed and tokenised before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli.terminal import bar, message, result
from mlx_transfusion.cli.train import Overrides, SkipBadRows, with_flags

app = typer.Typer(
    no_args_is_help=True, help="Pack and tokenise data before a large run (docs/full_scale.md)."
)
Processes = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]


@app.command()
def build(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The config that trains on the shards.")
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help=".jsonl or .txt files (also .gz), or .tar files of captioned pictures."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the shards.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder or tar of the pictures.", show_default="beside the rows")
    ] = None,
    processes: Processes = 1,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="On the Ray cluster of this machine or of RAY_ADDRESS (needs [ray])."),
    ] = False,
    flips: Annotated[bool, typer.Option("--flips", help="Also the latents of mirrored pictures.")] = False,
    dtype: Annotated[str, typer.Option(help="Of latents: float16 or float32.")] = "float16",
    overrides: Overrides = None,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Tokenise and pack each input into a shard, its pictures as pixels or latents; goes on where it was stopped."""
    from mlx_transfusion.shards.build import build as run
    from mlx_transfusion.shards.build import in_processes
    from mlx_transfusion.shards.recipe import make_recipe
    from mlx_transfusion.training.config import load_train_config

    if ray:
        from mlx_transfusion.shards.ray_build import on_ray

    recipe = make_recipe(
        load_train_config(config, with_flags(overrides, skip_bad_rows)),
        flips=flips,
        dtype=dtype,
        images=str(images) if images else None,
    )
    with bar("shards", len(inputs)) as shown:
        index = run(recipe, output, inputs, on_ray() if ray else in_processes(processes), shown.update)
    total = {
        key: sum(s[key] for s in index["shards"])
        for key in ("sequences", "rows", "bad_rows", "pictures", "repeated")
    }
    positions = total["sequences"] * recipe.sequence_length
    message(
        f"{total['rows']:,} rows ({total['bad_rows']:,} bad ones left out) in {total['sequences']:,} sequences, "
        f"{positions:,} tokens and patches with {total['pictures']:,} pictures; "
        f"{total['repeated'] / positions:.2%} repeat a text to fill up"
    )
    result(str(output))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards.")], processes: Processes = 1
) -> None:
    """Read all shards and compare their check sums."""
    from mlx_transfusion.errors import UserError
    from mlx_transfusion.shards.build import check as run

    if faults := run(folder, processes):
        for fault in faults:
            message(fault)
        raise UserError(f"{folder}: {len(faults)} damaged shards: delete them and run shards build again")
    result(str(folder))
