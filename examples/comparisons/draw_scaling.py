"""A table of two families at several budgets: power laws, parity ratios, and the curves as a picture (Pillow)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from draw_table import BLACK, BLUE, GREY, PANEL, TITLE, WHITE, Results, aligned
from intervals import figure
from measure_run import MEASURES
from PIL import Image, ImageDraw
from plan_runs import Table
from power_laws import PowerLaw, fit, parity_interval, parity_ratio

OUT_OF_REACH = 1e6
COLOURS = (BLUE, (220, 120, 20))
LEFT, BOTTOM, HEIGHT = 46, 34, 190
Points = tuple[list[float], list[float]]
"""Budgets in GFLOP and what was measured, a point for each run."""


def points(table: Table, results: Results, measure: str) -> dict[str, Points]:
    """Of each family: all its finished runs. Captions and texts count as perplexities, as in the paper."""
    out: dict[str, Points] = {}
    for row in table.rows:
        x, y = out.setdefault(row.family or row.label, ([], []))
        for run in results.get(row.variant, ()):
            value = figure([run["measures"][measure]]).value
            x.append(run["gflop"])
            about = MEASURES[measure]
            y.append(math.exp(value) if about.nats else about.factor * value)
    return out


def parity(table: Table, results: Results) -> str:
    """Exponents of both families and the parity ratio of each measure, beside the paper's. Markdown."""
    head = [
        "",
        "paper's parity ratio",
        "exponent of {}",
        "exponent of {}",
        "R squared",
        "parity ratio",
        "95%",
    ]
    body = []
    for k, name in enumerate(table.measures):
        families = points(table, results, name)
        if len(families) != 2 or any(len(set(x)) < 2 or min(y) <= 0 for x, y in families.values()):
            continue
        ours, theirs = families.values()
        laws = [fit(*ours), fit(*theirs)]
        low, high = parity_interval(ours, theirs)
        paper = table.paper_ratios[k] if k < len(table.paper_ratios) else math.nan
        body.append([
            _title(name), "" if math.isnan(paper) else f"{paper:g}", *(f"{law.exponent:.3f}" for law in laws),
            ", ".join(f"{law.r_squared:.2f}" for law in laws), _ratio(parity_ratio(ours, theirs)),
            f"[{_ratio(low)}, {_ratio(high)}]",
        ])  # fmt: skip
    if not body:
        return ""
    names = iter(points(table, results, table.measures[0]))
    head = [h.format(next(names)) if "{}" in h else h for h in head]
    return "\n".join(["", "Power laws of the training operations:", "", *aligned(head, body), ""])


def _ratio(value: float) -> str:
    """A parity ratio; "never" where no budget is enough, or more than OUT_OF_REACH times as much."""
    return f"{value:.3g}" if value < OUT_OF_REACH else "never"


def picture(table: Table, results: Results) -> Image.Image:
    """One panel for each measure, both axes logarithmic: a dot for each run, a line for each law."""
    image = Image.new("RGB", ((LEFT + PANEL) * len(table.measures), TITLE + HEIGHT + BOTTOM), WHITE)
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(table.measures):
        _panel(draw, k * (LEFT + PANEL) + LEFT, _title(name), points(table, results, name))
    return image


def _panel(draw: ImageDraw.ImageDraw, left: int, title: str, families: Mapping[str, Points]) -> None:
    draw.text((left, 4), title, BLACK)
    xs = [v for x, _ in families.values() for v in x]
    ys = [v for _, y in families.values() for v in y]
    if len(set(xs)) < 2 or min(ys) <= 0:
        return
    spans = [(math.log(min(v)) - 0.1, math.log(max(v)) + 0.1) for v in (xs, ys)]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = ((math.log(v) - a) / (b - a) for v, (a, b) in zip((x, y), spans, strict=True))
        return left + across * (PANEL - 14), TITLE + (1 - up) * HEIGHT

    draw.rectangle([left, TITLE, left + PANEL - 14, TITLE + HEIGHT], outline=GREY)
    for end in (min(xs), max(xs)):
        draw.text((place(end, ys[0])[0], TITLE + HEIGHT + 4), f"{end:.3g} GFLOP", BLACK, anchor="mt")
    for end in (min(ys), max(ys)):
        draw.text((left - 4, place(xs[0], end)[1]), f"{end:.3g}", BLACK, anchor="rm")
    for i, ((name, (x, y)), colour) in enumerate(zip(families.items(), COLOURS, strict=False)):
        for point in zip(x, y, strict=True):
            at = place(*point)
            draw.ellipse([at[0] - 3, at[1] - 3, at[0] + 3, at[1] + 3], colour)
        if len(set(x)) > 1:
            _line(draw, fit(x, y), (min(xs), max(xs)), place, colour)
        draw.text((left + 4 + 90 * i, TITLE + HEIGHT + 20), name, colour)


def _line(draw: ImageDraw.ImageDraw, law: PowerLaw, ends: Sequence[float], place: Any, colour: Any) -> None:
    draw.line([place(x, law.at(x)) for x in ends], colour, 1)


def _title(measure: str) -> str:
    about = MEASURES[measure]
    return about.title.replace("nats a token", "perplexity") if about.nats else about.title
