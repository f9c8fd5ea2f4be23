"""`mlx-transfusion bench`: how fast a model is on this machine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, result
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import PAINTERS


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="As for generate. Repeatable.",
            show_default=", ".join(PAINTERS),
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each thing is timed.")] = 3,
    training: Annotated[bool, typer.Option(help="Time steps of training too.")] = True,
    as_json: options.Json = False,
) -> None:
    """Time reading, writing, painting and training: the median of some rounds, their range, and peak memory."""
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: use at least 1")
    from mlx_transfusion.cli.info import installation_facts, lines

    machine = installation_facts()
    if not as_json:
        for line in lines(machine):
            result(line)
    reports = []
    for name in model or PAINTERS:
        facts, text = _bench(name, rounds, training)
        reports.append(facts)
        if not as_json:
            result("\n" + "\n".join(text))
    if as_json:
        result({"machine": machine, "models": reports})


def _bench(name: str, rounds: int, training: bool) -> tuple[dict[str, Any], list[str]]:
    """One model's report, as data and as lines."""
    from mlx_transfusion.bench.cases import picture_cases, text_cases
    from mlx_transfusion.bench.measure import measure, table
    from mlx_transfusion.bench.training_cases import training_cases
    from mlx_transfusion.model_io import load
    from mlx_transfusion.quantization import parameter_count

    start = time.perf_counter()
    loaded = load(name)
    seconds, count = time.perf_counter() - start, parameter_count(loaded.model)
    with tempfile.TemporaryDirectory() as folder, bar("bench", 1.0) as progress:
        cases = text_cases(loaded) | picture_cases(loaded)
        if training:
            cases |= training_cases(loaded, Path(folder))
        results = measure(cases, rounds, progress.update)
    facts = {
        "model": loaded.name,
        "parameters": count,
        "load_seconds": seconds,
        "results": [r.to_dict() for r in results],
    }
    title = f"{loaded.name}: {count / 1e6:,.1f} million parameters, loaded in {seconds:.2f} s"
    return facts, [title, *table(results)]
