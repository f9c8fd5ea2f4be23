"""Timing: cases in rounds, one after the other, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import mlx.core as mx

MIB = 1 << 20
MIN_SECONDS = 0.2
"""A case is called again within a round until so much time has passed: one short call measures the clock."""


@dataclass(frozen=True)
class Case:
    """Something to time."""

    call: Callable[[], object]
    """Does the work, computed to the end when it returns."""
    tokens: int | None = None
    """Tokens of one call, for which the rate is given; None gives seconds."""


@dataclass(frozen=True)
class Result:
    """What a case took."""

    what: str
    median: float
    low: float
    high: float
    """Median, lowest and highest round."""
    unit: str
    """"tokens/s" or "s"."""
    peak_mib: float
    """Most memory that mlx held during the case, the model's weights among it."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    cases: Mapping[str, Case], rounds: int, progress: Callable[[float, str], None] = lambda done, what: None
) -> list[Result]:
    """Run every case once to warm up, then `rounds` times in turn. progress(share done, name)."""
    values: dict[str, list[float]] = {name: [] for name in cases}
    peaks = dict.fromkeys(cases, 0.0)
    total = len(cases) * (rounds + 1)
    for number in range(rounds + 1):
        for k, (name, case) in enumerate(cases.items()):
            progress((number * len(cases) + k) / total, name)
            mx.reset_peak_memory()
            seconds = _seconds(case, once=number == 0)
            peaks[name] = max(peaks[name], mx.get_peak_memory() / MIB)
            if number:
                values[name].append(seconds if case.tokens is None else case.tokens / seconds)
    return [_result(name, cases[name], values[name], peaks[name]) for name in cases]


def _seconds(case: Case, once: bool) -> float:
    """Mean seconds of a call."""
    start, calls = time.perf_counter(), 0
    while True:
        case.call()
        calls += 1
        passed = time.perf_counter() - start
        if once or passed >= MIN_SECONDS:
            return passed / calls


def _result(name: str, case: Case, values: Sequence[float], peak: float) -> Result:
    unit = "s" if case.tokens is None else "tokens/s"
    return Result(name, median(values), min(values), max(values), unit, peak)


def table(results: Sequence[Result]) -> list[str]:
    """The results as aligned lines."""
    width = max(len(r.what) for r in results)
    return [
        f"{r.what.ljust(width)}  {_number(r.median):>8} {r.unit.ljust(8)} "
        f"({_number(r.low)} to {_number(r.high)})  peak {r.peak_mib:,.0f} MiB"
        for r in results
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
