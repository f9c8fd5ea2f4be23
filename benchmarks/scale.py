"""How time and memory grow: `python benchmarks/scale.py --output scale.json --figure docs/scale.png`.

Each curve changes one thing and keeps the rest (width 128, 4 layers, 64 image tokens), and gets an exponent: the
slope of the logarithm of the time over that of the size, fitted to the upper half of the curve, where fixed costs
weigh least. The exponent of the operations, counted by `mlx_transfusion.flops`, stands beside it: the time may grow
as the work does.

sequence    step by tokens of a caption, in one document
width       step by the model's width
pictures    step by pictures of a document
patches     step by tokens of a picture
writing     128 to 1,024 tokens, one by one behind the cache
prefix      a denoising step by tokens of its prefix

All points of a curve are timed in turn, `--rounds` times; the median counts. Memory is MLX's peak of a step over what
it held before.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from compare import BUSY, NO_VERDICT, machine, say, write
from ours import model_config
from PIL import Image, ImageDraw
from workload import Workload, timed

from mlx_transfusion import noise, sequence
from mlx_transfusion.flops import Work, forward_flops, step_flops, work_of
from mlx_transfusion.lanes import lanes
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig
from mlx_transfusion.training.data import Batch
from mlx_transfusion.training.optimizer import make_optimizer
from mlx_transfusion.training.step import Step

BASE = Workload(width=128, layers=4, heads=2, feed_forward=341, batch=8)
TOLERANCE = 0.15
"""How far the exponent of time may lie above that of operations before it is marked."""


@dataclass(frozen=True)
class Point:
    """One size of one curve."""

    size: int
    call: Callable[[], object]
    flops: float


def step_point(size: int, workload: Workload, text: int, pictures: int) -> Point:
    """A training step of documents with `text` tokens and some pictures."""
    config = replace(model_config(workload), max_position=1 << 14)
    mx.random.seed(0)
    model = Transfusion(config)
    mx.eval(model.parameters())
    n, count = config.patches_per_image, workload.batch
    words = sequence.Text(tuple(np.random.default_rng(0).integers(6, workload.vocabulary, text).tolist()))
    documents = [
        sequence.document([words, *(sequence.Image(i * pictures + k, n) for k in range(pictures))], config)
        for i in range(count)
    ]
    packed = sequence.pack(documents, max(map(sequence.length, documents)))
    shape = (count * pictures, workload.image_size, workload.image_size, workload.channels)
    batch = Batch(
        packed,
        np.zeros(shape, np.uint8),
        noise.normal(0, 0, shape, "noise"),
        np.full(shape[0], 0.7, np.float32),
    )
    settings = TrainConfig(
        output="",
        tokenizer="",
        data=DataConfig(train=(SourceConfig(""),)),
        model={},
        optimizer=OptimizerConfig(clip=0),
    )
    optimizer = make_optimizer(settings.optimizer)
    weights = model.parameters()
    optimizer.init(weights)
    step = Step(model, optimizer, settings)

    def call() -> None:
        with lanes(count):
            mx.eval(step.gradients(weights, batch, batch.text_targets, shape[0], 0))

    return Point(size, call, step_flops(config, work_of(packed)))


def width_workload(width: int) -> Workload:
    """Heads of 64 and the usual feed-forward layer."""
    return replace(BASE, width=width, heads=width // 64, feed_forward=width * 8 // 3)


def patch_workload(side: int) -> Workload:
    """Pictures of side x side patches of 4x4 pixels."""
    return replace(BASE, image_size=4 * side)


def writer() -> tuple[Transfusion, Any]:
    model = Transfusion(replace(model_config(BASE), max_position=1 << 14))
    mx.eval(model.parameters())
    return model, model.config


def writing_point(tokens: int) -> Point:
    """Greedy tokens, one by one."""
    model, config = writer()

    def call() -> None:
        _, cache = model.prefill(np.array([[1]], np.int32), np.array([1]))
        token = np.array([[7]], np.int32)
        for _ in range(tokens):
            logits = model.extend_text(token, np.ones(1, int), cache)
            token = np.array(mx.argmax(logits, -1), np.int32)[:, None]

    pairs = tokens * (tokens + 1) // 2
    return Point(tokens, call, forward_flops(config, Work(tokens, pairs, tokens, 0)))


def prefix_point(length: int) -> Point:
    """One denoising step of 2 rows."""
    model, config = writer()
    ids = np.random.default_rng(0).integers(6, 2000, (1, length)).astype(np.int32)
    cache = model.prefill(ids, np.array([length]))[1].select([0, 0])
    mx.eval(cache.layers)
    x, angle, n = mx.random.normal((2, *model.latent_shape)), mx.full((2,), 0.7), config.patches_per_image

    def call() -> None:
        with lanes(2):
            mx.eval(model.velocity(x, angle, cache))

    return Point(length, call, 2 * forward_flops(config, Work(n, n * (n + length), 0, 1)))


CURVES: dict[str, Callable[[], list[Point]]] = {
    "sequence": lambda: [step_point(t, replace(BASE, batch=2), t, 0) for t in (128, 256, 512, 1024)],
    "width": lambda: [step_point(w, width_workload(w), 24, 1) for w in (64, 128, 256, 384)],
    "pictures": lambda: [step_point(k, replace(BASE, batch=2), 24, k) for k in (1, 2, 4, 8)],
    "patches": lambda: [
        step_point(s * s, replace(patch_workload(s), batch=2), 24, 1) for s in (4, 8, 16, 24)
    ],
    "writing": lambda: [writing_point(n) for n in (128, 256, 512, 1024)],
    "prefix": lambda: [prefix_point(n) for n in (16, 128, 512, 2048)],
}


def measure(points: list[Point], rounds: int) -> dict[str, list[float]]:
    """Sizes, median seconds, counted operations and peak bytes."""
    peaks = []
    for point in points:
        point.call()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        point.call()
        peaks.append(float(mx.get_peak_memory() - before))
    seconds: list[list[float]] = [[] for _ in points]
    for _ in range(rounds):
        for values, point in zip(seconds, points, strict=True):
            values += timed(point.call, 0, 1)
    return {
        "size": [p.size for p in points],
        "seconds": [median(v) for v in seconds],
        "flops": [p.flops for p in points],
        "peak": peaks,
    }


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log(value) over log(size) in the upper half of a curve."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def table(curves: dict[str, dict[str, list[float]]]) -> str:
    """In Markdown: the ends of each curve and the exponents."""
    lines = [
        "| curve | sizes | seconds | exponent of time | of operations | of memory | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, c in curves.items():
        time, work, peak = (exponent(c["size"], c[key]) for key in ("seconds", "flops", "peak"))
        mark = "above the work" if time > work + TOLERANCE else ""
        sizes, seconds = (
            f"{c['size'][0]:,} to {c['size'][-1]:,}",
            f"{c['seconds'][0]:.3f} to {c['seconds'][-1]:.3f}",
        )
        lines.append(f"| {name} | {sizes} | {seconds} | {time:.2f} | {work:.2f} | {peak:.2f} | {mark} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, list[float]]], file: Path) -> None:
    """One panel a curve, both axes logarithmic: seconds as dots and a line, the operations' shape in grey."""
    width, height, margin = 320, 240, 30
    picture = Image.new("RGB", (width * 3, height * -(-len(curves) // 3)), "white")
    pen = ImageDraw.Draw(picture)
    for number, (name, c) in enumerate(curves.items()):
        left, top = number % 3 * width, number // 3 * height
        scale = c["seconds"][-1] / c["flops"][-1]
        lines = {"grey": [f * scale for f in c["flops"]], "blue": c["seconds"]}
        x, y = np.log(c["size"]), {colour: np.log(values) for colour, values in lines.items()}
        low, high = min(v.min() for v in y.values()), max(v.max() for v in y.values())
        for colour, values in y.items():
            across = left + margin + (x - x[0]) / (x[-1] - x[0]) * (width - 2 * margin)
            down = top + height - margin - (values - low) / (high - low) * (height - 2 * margin - 20)
            points = list(zip(across.tolist(), down.tolist(), strict=True))
            pen.line(points, fill=colour, width=2)
            if colour == "blue":
                for px, py in points:
                    pen.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline="lightgrey")
        title = (
            f"{name}: {c['size'][0]:,} to {c['size'][-1]:,}, exponent {exponent(c['size'], c['seconds']):.2f}"
        )
        pen.text((left + 10, top + 8), title, fill="black")
        pen.text(
            (left + 10, top + height - 18), f"{c['seconds'][0]:.3f} to {c['seconds'][-1]:.3f} s", fill="black"
        )
    picture.save(file)


def main() -> None:
    """Measure, print the table, write the numbers and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    load = os.getloadavg()[0]
    if load > BUSY:
        say(f"warning: {NO_VERDICT}")
    curves = {}
    for name in options.only:
        say(name)
        curves[name] = measure(CURVES[name](), options.rounds)
    facts = machine(int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)) | {
        "load before": load
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"\n{table(curves)}")
    if options.output is not None:
        write(options.output, {"machine": facts, "curves": curves})
    if options.figure is not None:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
