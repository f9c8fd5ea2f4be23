"""Run comparisons, draw their figures and write their tables: python examples/comparisons/run_tables.py attention

What is finished is skipped and what was interrupted goes on, so the command may be stopped and given again. README.md
beside this file tells more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import draw_page
import draw_scaling
import draw_table
import serving_speed
from measure_run import measure
from plan_runs import (
    FOLDER,
    Plan,
    Run,
    Table,
    model_of,
    plan_run,
    read_plan,
    read_table,
    read_variant,
    runs_of,
    table_names,
)

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.evaluation.features import FeatureExtractor, default_extractor
from mlx_transfusion.model_io import load
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.training import checkpoint
from mlx_transfusion.training.trainer import train

SERVING = "serving"
"""Name of the file with the seconds of painting, behind the table's."""


def run_tables(
    names: Sequence[str],
    output: Path,
    results: Path,
    *,
    folder: Path = FOLDER,
    seeds: Sequence[int] | None = None,
    extractor: FeatureExtractor | None = None,
) -> None:
    """Train and measure what is missing, seed by seed over all tables; tables are drawn again after every run.

    output: checkpoints. results: one JSON for each run, and the table and figure of every name. seeds: those of
    comparisons.toml unless given. Raises UserError for bad files and for results of other settings.
    """
    plan = read_plan(folder)
    plan = plan if seeds is None else replace(plan, seeds=tuple(seeds))
    tables = {name: read_table(name, folder) for name in names}
    for path in (output, results):
        path.mkdir(parents=True, exist_ok=True)
    for seed in plan.seeds:
        for variant in dict.fromkeys(row.variant for table in tables.values() for row in table.rows):
            if read_result(variant, seed, plan, results, folder) is None:
                run = plan_run(variant, seed, plan, output, folder)
                finish(run, results, extractor or default_extractor(), folder, output / "features.npz")
                draw(tables, plan, results, folder)
    draw(tables, plan, results, folder)


def finish(run: Run, results: Path, extractor: FeatureExtractor, folder: Path, kept: Path) -> None:
    """Train a run from where it stands, measure it and write its result."""
    print(f"{run.name}: {run.config.steps} steps, {run.gflop:.0f} GFLOP", file=sys.stderr, flush=True)
    fresh = not checkpoint.checkpoints(Path(run.config.output) / "checkpoints")
    start = time.process_time()
    path = train(run.config)
    trained = time.process_time()
    loaded = load(path)
    config = load_config(folder / "evaluate.toml")
    measures = measure(loaded, config, extractor, kept)
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "budget_gflop": run.budget,
        "set": list(run.sets),
        "steps": run.config.steps,
        "gflop": float(f"{run.gflop:.5g}"),
        "parameters": parameter_count(loaded.model),
        "seconds": {
            "train": round(trained - start, 1) if fresh else None,
            "measure": round(time.process_time() - trained, 1),
        },
        "measures": measures,
    }
    write(results / f"{run.name}.json", result)


def draw(
    tables: dict[str, Table], plan: Plan, results: Path, folder: Path = FOLDER, page: Path | None = None
) -> None:
    """Write NAME.md and NAME.png of what is finished; `page` gets shorter tables between its markers."""
    short = {}
    for name, table in tables.items():
        found = {}
        for variant in (row.variant for row in table.rows):
            of_seeds = [read_result(variant, seed, plan, results, folder) for seed in plan.seeds]
            found[variant] = [result for result in of_seeds if result is not None]
        below = ""
        if table.paper_ratios:
            below = draw_scaling.parity(table, found)
        elif table.serving and all(found[row.variant] for row in table.rows):
            below = _serving(name, table, plan, results, folder)
        text = draw_table.markdown(table, found) + below
        (results / f"{name}.md").write_text(text, encoding="utf-8")
        drawing = draw_scaling if table.paper_ratios else draw_table
        drawing.picture(table, found).save(results / f"{name}.png", optimize=True)
        if page is not None:
            short[name] = draw_table.short_markdown(table, found) + below
    if page is not None:
        draw_page.fill(page, short)


def _serving(name: str, table: Table, plan: Plan, results: Path, folder: Path) -> str:
    """The table of painting speed, measured once."""
    file = results / f"{name}-{SERVING}.json"
    config = load_config(folder / "evaluate.toml")
    settings = config.generation
    if not file.exists():
        shapes = {row.variant: model_of(row.variant, folder) for row in table.rows}
        models = {variant: shape for variant, shape in shapes.items() if isinstance(shape, ModelConfig)}
        write(file, serving_speed.painting_seconds(models, settings))
    seconds = {
        variant: {int(n): values for n, values in by_count.items()}
        for variant, by_count in json.loads(file.read_text()).items()
    }
    return serving_speed.table(
        seconds, {row.variant: row.label for row in table.rows}, settings.resolve().steps
    )


def read_result(
    variant: str, seed: int, plan: Plan, results: Path, folder: Path = FOLDER
) -> dict[str, Any] | None:
    """The result of a run, None if it has none yet. Raises UserError when it was trained with other settings."""
    file = results / f"{variant}-seed{seed}.json"
    if not file.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = [f"budget_gflop={result['budget_gflop']}", *result["set"]]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{file}: no result of a run, or damaged: delete it and run again") from error
    now = read_variant(variant, folder)
    wanted = [f"budget_gflop={now.budget_gflop or plan.budget_gflop}", *now.sets, f"seed={seed}"]
    if [s for s in found if not s.startswith("steps=")] != wanted:
        raise UserError(
            f"{file}: was trained with {' '.join(found)}, and the files say {' '.join(wanted)}: delete it or "
            "choose another folder for --results"
        )
    return result


def write(file: Path, data: dict[str, Any]) -> None:
    """JSON with a line for each measure; the file appears whole or not at all."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(_json(data) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _json(data: dict[str, Any], depth: int = 0) -> str:
    pad = " " * depth
    items = (
        f"{pad} {json.dumps(str(key))}: "
        + (
            _json(v, depth + 1)
            if isinstance(v, dict) and any(isinstance(w, dict) for w in v.values())
            else json.dumps(v)
        )
        for key, v in data.items()
    )
    return "{\n" + ",\n".join(items) + f"\n{pad}}}"


def show_plan(names: Sequence[str], plan: Plan, output: Path, results: Path) -> None:
    """What would run: steps, operations, and the command that repeats it by hand."""
    seen = set()
    for name in names:
        for run in runs_of(read_table(name), plan, output):
            if run.name in seen:
                continue
            seen.add(run.name)
            state = "to do" if read_result(run.variant, run.seed, plan, results) is None else "finished"
            sets = " ".join(f"--set '{s}'" for s in run.sets)
            print(f"{run.name}: {state}, {run.config.steps} steps, {run.gflop:.0f} GFLOP")
            print(f"  mlx-transfusion train {run.base} {sets} --set output={run.config.output}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=f"all, or {', '.join(table_names())}")
    parser.add_argument("--output", type=Path, default=Path("runs/comparisons"), help="checkpoints")
    parser.add_argument(
        "--results", type=Path, help="results, tables and figures; OUTPUT/results if not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of comparisons.toml")
    parser.add_argument("--plan", action="store_true", help="only say what would run")
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    parser.add_argument("--page", type=Path, help="with --draw: a Markdown file that gets short tables too")
    given = parser.parse_args()
    names = table_names() if "all" in given.tables else given.tables
    results = given.results or given.output / "results"
    try:
        plan = read_plan()
        plan = plan if given.seeds is None else replace(plan, seeds=tuple(given.seeds))
        if given.draw:
            draw({name: read_table(name) for name in names}, plan, results, page=given.page)
        elif given.plan:
            show_plan(names, plan, given.output, results)
        else:
            run_tables(names, given.output, results, seeds=given.seeds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
