"""What consistency models cost and save, side by side in one run: `python benchmarks/consistency.py`.

Three pairs of things, on the CPU in float32 unless MLX's default device is another:

tangent        the student's value and tangent of 32 pictures (one forward-mode pass, compiled) beside its value
               alone. The keys and values of the captions are there already, as in training.
training step  one distillation step beside one diffusion step on the same documents, those of a training config:
               noising, gradients (with the guided teacher's passes) and update. Without the reading of files.
picture        a picture from its prompt to its 8-bit pixels, one at a time, everything counted: tokens, prefix,
               passes, decoding. The student's 2 steps beside its guided teacher's 250 steps of ddpm and 16 of
               dpmpp_2m.

Everything runs in this process, first once or more without counting (which compiles), then in rounds that take each
in turn. A round's number is the median of its calls; the report has the median over rounds with the lowest and
highest, and ratios that are taken within a round.

Time does not depend on the weights' values: where there is no student yet, its teacher's weights stand for it.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from compare import BUSY, HERE, NO_VERDICT, machine, say, write
from consistency_cases import (
    DIFFUSION_STEP,
    DISTILLATION_STEP,
    MANY,
    SIXTEEN,
    STUDENT,
    TANGENT,
    TWO,
    VALUE,
    Case,
    prepare,
)
from report import Summary, ratio, summary
from workload import timed

from mlx_transfusion.errors import UserError

CONFIG = HERE.parent / "examples" / "emoji" / "distill.toml"


@dataclass(frozen=True)
class Goal:
    """What the ratio slow / fast should be."""

    slow: str
    fast: str
    limit: float
    at_most: bool = False

    def reached(self, found: float) -> bool:
        """Whether a ratio is on the right side of the limit."""
        return found <= self.limit if self.at_most else found >= self.limit


GOALS = (
    Goal(TANGENT, VALUE, 2.0, at_most=True),
    Goal(DISTILLATION_STEP, DIFFUSION_STEP, 3.0, at_most=True),
    Goal(MANY, TWO, 15.0),
    Goal(SIXTEEN, TWO, 5.0),
)


Round = dict[str, list[float]]
"""Seconds of each call, by case."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the report and write it down; returns the exit code."""
    options = parse(arguments)
    load_before = os.getloadavg()[0]
    if load_before > BUSY:
        say(f"warning: {NO_VERDICT}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases, facts = prepare(options.config, options.student, folder, options.quick)
            rounds = measure(cases, options.rounds, options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)
    facts = machine(threads) | {"load before": round(load_before, 2), "quick": options.quick} | facts
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"\n{table(rounds)}\n\n{goals(rounds, verdict=load_before <= BUSY and not options.quick)}")
    if options.output is not None:
        found = {f"{g.slow} / {g.fast}": dataclasses.asdict(ratios(rounds, g)) for g in GOALS}
        write(options.output, {"facts": facts, "ratios": found, "rounds": rounds})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default=str(CONFIG), metavar="CONFIG.toml", help="of the distillation")
    parser.add_argument("--student", metavar="MODEL", help=f"default: {STUDENT}, or its teacher's weights")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all timings")
    parser.add_argument(
        "--quick", action="store_true", help="a small round, to see that it runs; judges nothing"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: use 1 or more")
    options.rounds = 1 if options.quick else options.rounds
    return options


def measure(cases: Mapping[str, Case], rounds: int, quick: bool = False) -> list[Round]:
    """Warm up, then time every case in turn, `rounds` times over."""
    say("warming up")
    for case in cases.values():
        timed(case.call, 1 if quick else case.warm_up, 0)
    out = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        out.append({name: timed(c.call, 0, 1 if quick else c.repeats) for name, c in cases.items()})
    return out


def seconds(rounds: Sequence[Round], name: str) -> list[float]:
    """The time of a case in each round: the median of its calls."""
    return [median(each[name]) for each in rounds]


def ratios(rounds: Sequence[Round], goal: Goal) -> Summary:
    """How many times as long the slow one takes, round by round."""
    return ratio(seconds(rounds, goal.slow), seconds(rounds, goal.fast))


def table(rounds: Sequence[Round]) -> str:
    """The times in Markdown."""
    lines = ["| what | milliseconds: median (lowest to highest round) |", "|---|---|"]
    for name in rounds[0]:
        time = summary([1000 * value for value in seconds(rounds, name)])
        lines.append(f"| {name} | {time.text(1, '')} |")
    return "\n".join(lines)


def goals(rounds: Sequence[Round], verdict: bool) -> str:
    """The ratios in Markdown, and whether they are what they should be."""
    lines = ["| ratio | times: median (lowest to highest round) | goal | |", "|---|---|---|---|"]
    for goal in GOALS:
        found = ratios(rounds, goal)
        judged = ("reached" if goal.reached(found.middle) else "NOT reached") if verdict else "not judged"
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.limit:g}"
        lines.append(f"| {goal.slow} / {goal.fast} | {found.text(2, '')} | {bound} | {judged} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
