"""From timings to a report: medians, spreads and ratios. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from workload import PICTURE, STEP

THEIRS = "transfusion-pytorch"
KINDS = (STEP, PICTURE)

Rounds = Sequence[Mapping[str, Mapping[str, Any]]]
"""For each round, what each peer's worker printed."""


@dataclass(frozen=True)
class Summary:
    """Median of a round's numbers over all rounds, and the lowest and highest of them."""

    middle: float
    low: float
    high: float

    def text(self, digits: int, unit: str) -> str:
        """For the report."""
        return f"{self.middle:.{digits}f}{unit} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def summary(values: Sequence[float]) -> Summary:
    """Of one number a round."""
    return Summary(median(values), min(values), max(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Summary:
    """How many times as fast we are: divided round by round, because a round's two runs share its weather."""
    return summary([a / b for a, b in zip(theirs, ours, strict=True)])


def seconds(rounds: Rounds, peer: str, measurement: str) -> list[float]:
    """A peer's time in each round: the median of its calls."""
    return [median(result[peer]["seconds"][measurement]) for result in rounds]


def measurements(rounds: Rounds, peer: str, kind: str) -> list[str]:
    """The names under which a peer measured STEP or PICTURE; it may have several ways to do one thing."""
    return [name for name in rounds[0][peer]["seconds"] if name.split(",")[0] == kind]


def fastest(rounds: Rounds, peer: str, kind: str) -> str:
    """The one of them with the lowest median."""
    return min(measurements(rounds, peer, kind), key=lambda name: median(seconds(rounds, peer, name)))


def ratios(rounds: Rounds) -> dict[str, dict[str, Summary]]:
    """Measurement -> our peer -> how many times as fast it is as the fastest way of THEIRS."""
    ours = [peer for peer in rounds[0] if peer != THEIRS]
    out: dict[str, dict[str, Summary]] = {}
    for kind in KINDS:
        best = seconds(rounds, THEIRS, fastest(rounds, THEIRS, kind))
        out[kind] = {peer: ratio(best, seconds(rounds, peer, kind)) for peer in ours}
    return out


def table(rounds: Rounds) -> str:
    """The report in Markdown: one line for each measurement and peer."""
    lines = [
        "| measurement | peer | parameters | seconds: median (lowest to highest round) | times as fast |",
        "|---|---|---|---|---|",
    ]
    found = ratios(rounds)
    for kind in KINDS:
        for peer, result in rounds[0].items():
            for name in measurements(rounds, peer, kind):
                time = summary(seconds(rounds, peer, name)).text(3, "")
                speed = found[kind][peer].text(2, "x") if peer in found[kind] else _mark(rounds, name, kind)
                lines.append(f"| {name} | {peer} | {result['parameters']:,} | {time} | {speed} |")
    return "\n".join(lines)


def _mark(rounds: Rounds, name: str, kind: str) -> str:
    return "1 (the peer's fastest way)" if name == fastest(rounds, THEIRS, kind) else ""
