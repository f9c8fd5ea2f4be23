"""The goals of this project's speed, and what one run of `compare.py` says about each. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from report import THEIRS, Summary, summary
from workload import PICTURE, STEP

OURS = "mlx-transfusion"
EAGER, COMPILED = "PyTorch path, eager", "PyTorch path, torch.compile"

Run = Mapping[str, Any]
"""One round: worker -> what it printed."""


@dataclass(frozen=True)
class Goal:
    """A number that one round gives, and the side of the limit it should be on."""

    what: str
    found: Callable[[Run], float]
    limit: float
    at_most: bool = False
    unit: str = "x"
    digits: int = 2
    note: str = ""
    """What to know beside the number."""

    def judge(self, rounds: Sequence[Run]) -> Summary | None:
        """The number over all rounds that have it; None where no round does."""
        values = []
        for one in rounds:
            try:
                values.append(self.found(one))
            except (KeyError, IndexError, ZeroDivisionError):  # its worker did not run, or failed
                continue
        return summary(values) if values else None

    def reached(self, found: Summary) -> bool:
        """Whether the median is on the right side."""
        return found.middle <= self.limit if self.at_most else found.middle >= self.limit

    @property
    def bound(self) -> str:
        """The limit for people to read."""
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}{self.unit}"


def time(run: Run, worker: str, name: str) -> float:
    """Median seconds of what a worker timed."""
    return median(run[worker]["seconds"][name])


def value(run: Run, worker: str, name: str) -> float:
    """Median of a number that is no time."""
    return median(run[worker]["values"][name])


def fastest(run: Run, kind: str) -> float:
    """Seconds of the fastest of transfusion-pytorch's ways to do one thing."""
    seconds = run[THEIRS]["seconds"]
    return min(median(v) for name, v in seconds.items() if name.split(",")[0] == kind)


def of_limit(run: Run, kind: str) -> float:
    """The share of our time that the products alone would take at the machine's measured rate."""
    return run[OURS]["flops"][kind] / (value(run, "matmul", "MLX") * 1e9) / time(run, OURS, kind)


def cold(run: Run, name: str, minus: str | None = None) -> float:
    """Seconds of a command, over those of another."""
    return time(run, "start", name) - (time(run, "start", minus) if minus else 0.0)


def worst(names: Sequence[str]) -> Callable[[Run], float]:
    """The largest of some values of the memory worker, in percent."""
    return lambda run: max(100 * value(run, "memory", name) for name in names)


def text(what: str, kind: str, measurement: str, limit: float, note: str = "") -> Goal:
    """A ratio of the text worker, of one kind of weights; limit 0 is none."""
    return Goal(f"{what}, {kind}", lambda run: median(run["text"][kind][measurement]), limit, note=note)


TEXT = tuple(
    text(what, kind, measurement, limit, "" if limit else "no goal: for comparison")
    for what, measurement, limit in (
        ("text decode beside mlx-lm", "decode", 1),
        ("text prefill beside mlx-lm", "prefill", 1),
        ("first token of a text, times as fast as mlx-lm", "first token", 0),
        ("loading a language model, times as fast as mlx-lm", "load", 0),
        ("text, batch of 8 beside one", "gain of 8", 3),
    )
    for kind in ("float32", "4 bits")
)


GOALS = (
    Goal(
        "fp32 matrix product through MLX, of numpy's rate",
        lambda r: 100 * value(r, "matmul", "MLX") / value(r, "matmul", "numpy"), 80, unit="%", digits=0,
    ),
    Goal("training step, times as fast as transfusion-pytorch", lambda r: fastest(r, STEP) / time(r, OURS, STEP), 4),
    Goal(
        "training step, times as fast as our PyTorch path",
        lambda r: time(r, EAGER, STEP) / time(r, OURS, STEP), 0.75,
    ),
    Goal(
        "training step, times as fast as our PyTorch path with torch.compile",
        lambda r: time(r, COMPILED, STEP) / time(r, OURS, STEP), 0, note="no goal: for comparison",
    ),
    Goal("training step, of the matmul-rate limit", lambda r: 100 * of_limit(r, STEP), 50, unit="%", digits=0),
    Goal(
        "guided picture, 16 midpoint steps, times as fast as transfusion-pytorch",
        lambda r: fastest(r, PICTURE) / time(r, OURS, PICTURE), 8,
    ),
    Goal(
        "guided picture, of the matmul-rate limit", lambda r: 100 * of_limit(r, PICTURE), 0, unit="%", digits=0,
        note="no goal: what is left to win",
    ),
    Goal(
        "2-step student beside 16 guided midpoint steps, end to end",
        lambda r: time(r, "student", "16 guided midpoint steps") / time(r, "student", "2 steps"), 15, digits=1,
    ),
    Goal(
        "denoising step, prefix of 2,048 beside 16",
        lambda r: time(r, "prefix", "prefix of 2,048") / time(r, "prefix", "prefix of 16"), 1.3, at_most=True,
        note="counted in operations alone it is 2.2x at this width, where attention to 2,048 keys costs more than "
        "all weights of a layer",
    ),
    Goal(
        "8 pictures at once beside one by one",
        lambda r: time(r, "student", "8 one by one") / time(r, "student", "8 pictures at once"), 2,
    ),
    Goal(
        "sCM tangent and forward beside forward",
        lambda r: time(r, "student", "value and tangent") / time(r, "student", "value"), 2, at_most=True,
    ),
    *TEXT,
    Goal("AutoencoderKL decode, times as fast as diffusers", lambda r: beside(r, "decode 4 pictures"), 0,
         note="no goal: for comparison"),
    Goal("sampler's own arithmetic, times as fast as diffusers", lambda r: beside(r, "16 steps of the sampler"), 0,
         note="no goal: for comparison"),
    Goal("waiting for data, of a training step", lambda r: 100 * value(r, "data", "waiting"), 5, at_most=True,
         unit="%"),
    Goal("--help over a bare typer program", lambda r: cold(r, "--help", "--help of a bare typer program"), 0.3,
         at_most=True, unit=" s"),
    Goal("first picture of the bundled student, cold start", lambda r: cold(r, "first picture from a cold start"), 3,
         at_most=True, unit=" s"),
    Goal("estimate of a training's peak memory, of the peak", lambda r: value(r, "memory", "estimate"), 0.8),
    Goal("the same, upper bound", lambda r: value(r, "memory", "estimate"), 1.2, at_most=True),
    Goal("growth of arrays, 1,000 steps and 200 pictures",
         worst(["1000 steps, arrays", "200 pictures, arrays"]), 1, at_most=True, unit="%"),
    Goal("growth of the process, 1,000 steps and 200 pictures",
         worst(["1000 steps, process", "200 pictures, process"]), 1, at_most=True, unit="%"),
)  # fmt: skip


def beside(run: Run, name: str) -> float:
    """diffusers' seconds by ours."""
    return time(run, "diffusers", name) / time(run, "AutoencoderKL", name)


def table(rounds: Sequence[Run], verdict: bool) -> str:
    """Every goal in Markdown."""
    lines = ["| what | found: median (lowest to highest round) | goal | |", "|---|---|---|---|"]
    for goal in GOALS:
        found, aim = goal.judge(rounds), goal.bound if goal.limit else "none"
        if found is None:
            lines.append(f"| {goal.what} | not measured | {aim} | |")
            continue
        judged = goal.note if goal.note.startswith("no goal") else _verdict(goal, found, verdict)
        lines.append(f"| {goal.what} | {found.text(goal.digits, goal.unit)} | {aim} | {judged} |")
    return "\n".join(lines)


def _verdict(goal: Goal, found: Summary, verdict: bool) -> str:
    if not verdict:
        return "not judged"
    if goal.reached(found):
        return "reached"
    return f"**missed**{': ' + goal.note if goal.note else ''}"
