"""Distil and train consistency models of two-dimensional data: python examples/consistency_2d/run.py --output DIR

Writes results.json and consistency_2d.png. The teacher is the exact velocity of the data; every student starts from
random weights and sees the same data, noise and angles.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import figure
import mlx.core as mx
import numpy as np
import ring
from student import BATCH, LEARNING_RATE, MIDDLE, Experiment, Student, paint, train

from mlx_transfusion import noise

EXPERIMENTS = (
    Experiment("sCD"),
    Experiment("sCT", method="sct", tangent="none"),
    Experiment("sCT, normalised", method="sct"),
    Experiment("sCD, tangent as it is", tangent="none"),
    Experiment("sCD, no warm-up", warmup=0),
    Experiment("sCD, learned weight", weight=True),
    Experiment("sCD, learned weight, c = 0.002", weight=True, constant=0.002),
    Experiment("sCD, log tan(angle)", embedding="log_tan"),
    Experiment("sCD, Fourier scale 16", embedding="fourier"),
    Experiment("sCD, Fourier, as it is, no warm-up", embedding="fourier", tangent="none", warmup=0),
)


class Judge:
    """Exact samples, noises, and the ends of the teacher's trajectories: what every student is compared with."""

    def __init__(self, count: int) -> None:
        self.exact = mx.array(ring.sample(count, 1 << 40))
        self.noise = mx.array(noise.normal(0, 0, (count, 2), "ring/judge"))
        self.fresh = mx.array(noise.normal(0, 1, (count, 2), "ring/judge"))
        self.path = ring.ddim(self.noise, 100)

    def distance(self, samples: mx.array) -> float:
        """Energy distance of samples to as many exact ones."""
        return ring.energy_distance(samples, self.exact[: len(samples)])

    def glance(self, student: Student, count: int = 1024) -> float:
        """The same of a few one-step samples, cheap enough to repeat during training."""
        return self.distance(paint(student, self.noise[:count]))


def measure(experiment: Experiment, steps: int, judge: Judge) -> tuple[dict[str, Any], list[mx.array]]:
    """Train and judge one student. Returns its record, and its one-step and two-step samples."""
    history: list[tuple[int, float]] = []
    start = time.perf_counter()
    student, signals = train(experiment, steps, lambda step, s: history.append((step, judge.glance(s))))
    seconds = time.perf_counter() - start
    samples = [paint(student, judge.noise), paint(student, judge.noise, judge.fresh)]
    block = max(1, steps // 50)
    largest = signals[: steps // block * block, 2].reshape(-1, block).max(1)
    record = {
        **dataclasses.asdict(experiment),
        "energy_distance": {"1": judge.distance(samples[0]), "2": judge.distance(samples[1])},
        "squared_error_to_teacher": (samples[0] - judge.path[-1]).square().mean().item(),
        "gradient_norm": {"median": np.median(signals[:, 0]), "max": signals[:, 0].max()},
        "tangent": {"median": np.median(signals[:, 1]), "max": signals[:, 2].max()},
        "energy_distance_by_step": history,
        "largest_tangent_by_step": [[(i + 1) * block, v] for i, v in enumerate(largest.tolist())],
        "seconds": seconds,
    }
    return record, samples


def draw(
    records: dict[str, dict[str, Any]], painted: dict[str, list[mx.array]], judge: Judge, shown: int = 1500
) -> Any:
    """The figure: data and teacher, students, training."""

    def points(title: str, samples: mx.array, paths: np.ndarray | None = None) -> Any:
        return figure.scatter(title, np.array(samples[:shown]), paths)

    paths = np.stack([np.array(state[:60]) for state in judge.path])
    teacher = [
        points("exact samples", judge.exact),
        points("teacher's trajectories from noise", judge.path[-1][:60], paths),
        points("teacher, 100 steps", judge.path[-1]),
        points("teacher, 2 steps", ring.ddim(judge.noise, 2)[-1]),
    ]
    students = [
        points(f"{name}, {k} step{'s' * (k > 1)}", painted[name][k - 1])
        for name in ("sCD", "sCT")
        for k in (1, 2)
    ]
    distances = {n: r["energy_distance_by_step"] for n, r in records.items()}
    tangents = {n: r["largest_tangent_by_step"] for n, r in records.items()}
    training = [
        figure.curves("energy distance of one-step samples", distances, 1e-4, 10, 355),
        figure.curves("largest raw tangent", tangents, 1, 1e4, 355),
        figure.legend(list(records), 230),
    ]
    return figure.sheet([teacher, students, training])


def main() -> None:
    """Train every experiment, write results.json and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of each student")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: two students, 20 steps, for a smoke test"
    )
    arguments = parser.parse_args()
    steps, experiments = (20, EXPERIMENTS[:2]) if arguments.quick else (arguments.steps, EXPERIMENTS)
    judge = Judge(512 if arguments.quick else 4096)
    results: dict[str, Any] = {
        "steps": steps, "batch": BATCH, "learning_rate": LEARNING_RATE, "middle_angle": MIDDLE,
        "samples": len(judge.noise),
        "exact": judge.distance(mx.array(ring.sample(len(judge.noise), (1 << 40) + 1))),
        "teacher": {n: judge.distance(ring.ddim(judge.noise, n)[-1]) for n in (100, 16, 4, 2, 1)},
        "experiments": {},
    }  # fmt: skip
    painted: dict[str, list[mx.array]] = {}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for experiment in experiments:
        record, painted[experiment.name] = measure(experiment, steps, judge)
        results["experiments"][experiment.name] = record
        # After every student, so that a run that is stopped leaves what it has.
        (arguments.output / "results.json").write_text(json.dumps(results, indent=1, default=float) + "\n")
        print(f"{experiment.name}: energy distance {record['energy_distance']}", flush=True)
        if len(painted) > 1:
            figure_of = draw(results["experiments"], painted, judge)
            figure_of.save(arguments.output / "consistency_2d.png", optimize=True)


if __name__ == "__main__":
    main()
