"""docs/benchmarks.md from the results of `compare.py`. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import goals
from report import summary

HEAD = """# Benchmarks

Written by `python benchmarks/compare.py`; do not edit. All peers ran side by side on one machine, each in a process
of its own with the same number of threads, one after the other, and again for every round. A round's number is the
median of its calls; ratios are taken within a round. What is measured, and what could not be made equal, stands at
the top of the files in `benchmarks/`. [performance.md](performance.md) tells what bounds the numbers and what was
tried.
"""


def document(rounds: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], busy: str) -> str:
    """The page. busy: a sentence when the machine had other work, which then says so and judges nothing."""
    parts = [HEAD]
    if busy:
        parts.append(f"**{busy}**\n")
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n")
    parts.append("## Goals\n\n" + goals.table(rounds, verdict=not busy) + "\n")
    parts.append("## Times\n\n" + times(rounds) + "\n")
    if failed := failures(rounds):
        parts.append("## Not measured\n\n" + "\n".join(failed) + "\n")
    return "\n".join(parts)


def times(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Everything that was timed, in Markdown."""
    lines = ["| peer | what | seconds: median (lowest to highest round) |", "|---|---|---|"]
    for worker, result in _merged(rounds).items():
        for name in result.get("seconds", {}):
            values = [median(r[worker]["seconds"][name]) for r in rounds if name in _seconds(r, worker)]
            lines.append(f"| {worker} | {name} | {summary(values).text(4, '')} |")
    return "\n".join(lines)


def failures(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each worker that could not do its work."""
    found = {f"- {name}: {r['error']}" for one in rounds for name, r in one.items() if "error" in r}
    return sorted(found)


def _seconds(one: Mapping[str, Any], worker: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = one.get(worker, {}).get("seconds", {})
    return found


def _merged(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each worker's result of the first round in which it has one."""
    out: dict[str, Any] = {}
    for one in rounds:
        for worker, result in one.items():
            if "error" not in result:
                out.setdefault(worker, result)
    return out
