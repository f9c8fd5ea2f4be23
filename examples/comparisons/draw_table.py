"""A table's results as Markdown and as a picture (Pillow only)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intervals import Figure, difference, figure
from measure_run import MEASURES
from PIL import Image, ImageDraw
from plan_runs import Row, Table

Results = Mapping[str, Sequence[dict[str, Any]]]
"""Variant -> the results of its finished runs, by seed."""

COLUMNS, PANEL, LEFT, TITLE, LINE, AXIS = 4, 200, 150, 20, 22, 20
BLUE, GREY, BLACK, WHITE = (40, 90, 200), (205, 205, 205), (50, 50, 50), (255, 255, 255)


def markdown(table: Table, results: Results) -> str:
    """The paper's numbers beside ours, then what each line changes against the one it is compared with."""
    lines = [f"### {table.title}", ""]
    head = [
        "",
        *(f"paper: {c}" for c in table.paper_columns),
        *_titles(table),
        "seeds",
        "steps",
        "processor minutes a run",
    ]
    body = []
    for row in table.rows:
        runs = results.get(row.variant, ())
        paper = [f"{v:g}" for v in row.paper] or [""] * len(table.paper_columns)
        cells = [_cell(figure(_measure(runs, m)), MEASURES[m].factor) if runs else "" for m in table.measures]
        body.append([row.label, *paper, *cells, *_facts(runs)])
    lines += aligned(head, body)
    if changes := [
        [_change_label(table, row), *c] for row in table.rows if (c := _change(table, row, results))
    ]:
        lines += ["", "Differences, seed by seed and item by item:", ""]
        lines += aligned(["", *_titles(table)], changes)
    return "\n".join(lines) + "\n"


def short_markdown(table: Table, results: Results) -> str:
    """The same for a page of text: each difference, in the paper's numbers too, below its line, and fewer digits."""
    head = ["", *(f"paper: {c}" for c in table.paper_columns), *_titles(table), "seeds", "steps"]
    paper = {row.variant: row.paper for row in table.rows}
    body = []
    for row in table.rows:
        runs = results.get(row.variant, ())
        values = [
            _number(f.value, 3) if (f := _of(runs, m, MEASURES[m].factor)) else "" for m in table.measures
        ]
        papers = [f"{v:g}" for v in row.paper] or [""] * len(table.paper_columns)
        body.append([row.label, *papers, *values, *_facts(runs)[:2]])
        if row.against and (change := _change(table, row, results, digits=3)):
            pairs = zip(row.paper, paper[row.against], strict=True)
            papers = [_number(a - b, 3, "+") for a, b in pairs] or [""] * len(table.paper_columns)
            body.append([_change_label(table, row), *papers, *change, "", ""])
    return "\n".join(aligned(head, body)) + "\n"


def picture(table: Table, results: Results) -> Image.Image:
    """One panel for each measure: a dot with its interval for every line of the table."""
    across = min(COLUMNS, len(table.measures))
    down = -(-len(table.measures) // across)
    height = TITLE + LINE * len(table.rows) + AXIS
    image = Image.new("RGB", (LEFT + across * PANEL, down * height), WHITE)
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(table.measures):
        x, y = LEFT + k % across * PANEL, k // across * height
        if k % across == 0:
            for i, row in enumerate(table.rows):
                draw.text((6, y + TITLE + i * LINE + 4), row.label, BLACK)
        about = MEASURES[name]
        figures = [_of(results.get(row.variant, ()), name, about.factor) for row in table.rows]
        _panel(draw, x, y, f"{about.title} {'(more is better)' if about.more_is_better else ''}", figures)
    return image


def _panel(draw: ImageDraw.ImageDraw, x: int, y: int, title: str, figures: Sequence[Figure | None]) -> None:
    draw.text((x + 6, y + 4), title, BLACK)
    known = [f for f in figures if f is not None]
    if not known:
        return
    low, high = min(f.low for f in known), max(f.high for f in known)
    low, high = low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9

    def place(value: float) -> float:
        return x + 8 + (value - low) / (high - low) * (PANEL - 20)

    bottom = y + TITLE + LINE * len(figures)
    draw.line([(x + 8, bottom), (x + PANEL - 12, bottom)], GREY)
    for share, anchor in ((0.05, "lt"), (0.95, "rt")):
        value = low + share * (high - low)
        draw.text((place(value), bottom + 4), f"{value:.4g}", BLACK, anchor=anchor)
    for i, f in enumerate(figures):
        if f is not None:
            at = y + TITLE + i * LINE + LINE // 2
            draw.line([(place(f.low), at), (place(f.high), at)], BLUE, 2)
            draw.ellipse([place(f.value) - 4, at - 4, place(f.value) + 4, at + 4], BLUE)


def _measure(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [run["measures"][name] for run in runs]


def _of(runs: Sequence[dict[str, Any]], name: str, factor: float) -> Figure | None:
    if not runs:
        return None
    f = figure(_measure(runs, name))
    return Figure(factor * f.value, factor * f.low, factor * f.high)


def _change(table: Table, row: Row, results: Results, digits: int = 4) -> list[str]:
    """The row's measures minus those of the row it is compared with, over the seeds that both have; or nothing.

    Bold where the interval excludes 0, but never of one number a run: three seeds agree one time in four by chance.
    """
    if row.against is None:
        return []
    by_seed = [{run["seed"]: run for run in results.get(v, ())} for v in (row.variant, row.against)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return []
    pair = [[runs[s] for s in seeds] for runs in by_seed]
    cells = []
    for name in table.measures:
        ours, theirs = (_measure(runs, name) for runs in pair)
        change = difference(ours, theirs)
        sure = "values" in ours[0] and change.spread and (change.low > 0 or change.high < 0)
        mark = "**" if sure else ""
        cells.append(f"{mark}{_cell(change, MEASURES[name].factor, '+', digits)}{mark}")
    return cells


def _change_label(table: Table, row: Row) -> str:
    return f"{row.label} minus {next(r.label for r in table.rows if r.variant == row.against)}"


def _titles(table: Table) -> list[str]:
    return [MEASURES[m].title for m in table.measures]


def _facts(runs: Sequence[dict[str, Any]]) -> list[str]:
    seconds = [run["seconds"]["train"] + run["seconds"]["measure"] for run in runs if run["seconds"]["train"]]
    minutes = f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else ""
    return [str(len(runs)), str(runs[0]["steps"]) if runs else "", minutes]


def _cell(f: Figure, factor: float, sign: str = "", digits: int = 4) -> str:
    value, low, high = (
        _number(factor * v, digits, s) for v, s in ((f.value, sign), (f.low, ""), (f.high, ""))
    )
    return f"{value} [{low}, {high}]" if f.spread else value


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.0f}" if abs(value) >= 10**digits else f"{value:{sign}.{digits}g}"


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
