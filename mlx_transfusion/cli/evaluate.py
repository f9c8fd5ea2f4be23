"""`mlx-transfusion evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, result
from mlx_transfusion.errors import UserError


def evaluate(
    config: Annotated[Path, typer.Option("--config", "-c", metavar="FILE.toml", help="What to measure.")],
    model: options.Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the report here.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data, instead of the config's own.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, e.g. generation.steps=4. Repeatable."
        ),
    ] = None,
    frechet: Annotated[
        bool,
        typer.Option(
            "--frechet", help="Measure distances between sets of painted and real pictures instead."
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --frechet: paint with this model too, and give the ratios."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="With --frechet: keep pictures and features for the next run."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few samples only, to see that it runs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a model: losses, perplexity against n-gram baselines, retrieval of pictures and captions."""
    if output is not None and output.is_file() and not overwrite:
        raise UserError(f"{output}: exists already: choose another --output or give --overwrite")
    for flag, value in (("--compare", compare), ("--cache", cache)):
        if value is not None and not frechet:
            raise UserError(f"{flag} is for the distances between sets of pictures: give --frechet too")

    from mlx_transfusion.evaluation.report import evaluate as run
    from mlx_transfusion.evaluation.set_distances import evaluate_distances
    from mlx_transfusion.evaluation.table import distance_table, table

    with bar("evaluate", 1.0) as progress:

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(done / max(1, total), what)

        sets = overrides or []
        if frechet:
            report = evaluate_distances(
                model, config, output, quick, compare=compare, data=data, overrides=sets, cache=cache,
                progress=on_progress,
            )  # fmt: skip
        else:
            report = run(model, config, output, quick, data=data, overrides=sets, progress=on_progress)
    result(report if as_json else (distance_table if frechet else table)(report))
