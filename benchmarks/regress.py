"""Did a change make it slower? `python benchmarks/regress.py OLD [NEW]` compares two commits in one run.

Each commit is checked out into a temporary git worktree (NEW is the tree you are in unless it is named). Every round
starts a fresh process for each side, OLD NEW, then NEW OLD, on the same small cases of this file's worker:

training step    forward, backward and update; width 128, 4 layers, 8 documents of caption and picture
guided picture   8 midpoint steps at guidance 3
text             32 tokens behind a prompt, one by one
student          a picture of the bundled two-step model

A ratio is NEW's time over OLD's, taken within a round; the median over rounds counts. Above `--threshold` (1.15)
the exit code is 1. It is run by hand on a machine that does nothing else, not in continuous integration.
Each side is driven by its own benchmarks/ours.py, so older commits run as long as they have one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import Summary, ratio
from workload import Workload, timed

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
SMALL = Workload(width=128, layers=4, heads=2, feed_forward=341, batch=8, steps=8)
THRESHOLD = 1.15


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 when a case became slower than the threshold allows."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"old": check_out(options.old, Path(folder) / "old")}
        trees["new"] = check_out(options.new, Path(folder) / "new") if options.new else TREE
        try:
            rounds = [one_round(trees, number, options.threads) for number in range(options.rounds)]
        finally:
            for tree in trees.values():
                if tree != TREE:
                    git("worktree", "remove", "--force", str(tree))
    found = ratios(rounds)
    print(table(found, options.threshold))
    return int(any(each.middle > options.threshold for each in found.values()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="commit to compare with")
    parser.add_argument("new", nargs="?", help="commit; default: the tree as it is")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="NEW / OLD that still passes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1 or options.threshold <= 0:
        parser.error("--rounds and --threads: use 1 or more; --threshold: use a positive number")
    return options


def check_out(commit: str, folder: Path) -> Path:
    """A worktree of the commit; exits with one line when there is no such commit."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    return folder


def git(*command: str) -> None:
    done = subprocess.run(["git", "-C", str(TREE), *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: git {command[0]} {command[1]}: {done.stderr.strip().splitlines()[-1]}")


def one_round(trees: dict[str, Path], number: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds by side and case; the order of the sides turns around every round."""
    sides = list(trees) if number % 2 == 0 else list(trees)[::-1]
    out = {}
    for side in sides:
        tree = trees[side]
        path = os.pathsep.join(map(str, (tree, tree / "benchmarks", HERE)))
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": str(threads)}
        # With -P, for the folder of a script comes first otherwise.
        command = [sys.executable, "-P", str(HERE / "regress_worker.py"), str(tree)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {side}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        out[side] = {k: median(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    return out


def ratios(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Summary]:
    """Case -> NEW's time over OLD's, for the cases that both sides have."""
    names = [name for name in rounds[0]["old"] if name in rounds[0]["new"]]
    return {name: ratio([r["new"][name] for r in rounds], [r["old"][name] for r in rounds]) for name in names}


def table(found: dict[str, Summary], threshold: float) -> str:
    """In Markdown."""
    lines = ["| case | new / old: median (lowest to highest round) | |", "|---|---|---|"]
    for name, each in found.items():
        lines.append(f"| {name} | {each.text(2, '')} | {'slower' if each.middle > threshold else 'passes'} |")
    return "\n".join(lines)


def measure(cases: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of every call, after two that do not count."""
    return {name: timed(call, 2, repeats) for name, call in cases.items()}


if __name__ == "__main__":
    sys.exit(main())
