"""Worker: measures one part of mlx-transfusion by itself (`python parts.py NAME`) and prints one JSON object.

`seconds` has every timed call, `values` what is no time. `compare.py` starts it.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from consistency_cases import PICTURES, TANGENT, VALUE, tangent_cases
from finetune_memory import CASES
from finetune_memory import measure as memory_of
from ours import model_config
from workload import Workload, timed

from mlx_transfusion.images import save_png
from mlx_transfusion.lanes import lanes
from mlx_transfusion.model_io import load
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images
from mlx_transfusion.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainConfig
from mlx_transfusion.training.trainer import Trainer

PROMPT = "red heart"
BATCH = 8
NUMPY, MLX, SHAPES = "numpy", "MLX", "MLX, the step's shapes"
TWO, SIXTEEN, EIGHT, ONE_BY_ONE = "2 steps", "16 guided midpoint steps", "8 pictures at once", "8 one by one"
SHORT, LONG = "prefix of 16", "prefix of 2,048"
OURS_HELP, BARE_HELP, FIRST = "--help", "--help of a bare typer program", "first picture from a cold start"
STEPS, SERVED = 1000, 200


def matmul() -> dict[str, Any]:
    """Rate of float32 products: 1,024 x 1,024 by numpy and by MLX, and the shapes of a training step by MLX."""

    def rate(
        shapes: list[tuple[int, int, int]], product: Callable[[Any, Any], object], of: Any
    ) -> Callable[[], float]:
        pairs = [(of(m, k), of(n, k)) for m, k, n in shapes]
        flops = sum(2 * m * k * n for m, k, n in shapes)

        def call() -> float:
            # Numpy and MLX have a BLAS each, and one's idle threads spin for a while: long runs outlast that.
            repeats = max(1, int(4e10 / flops))
            seconds = timed(lambda: [product(a, b) for a, b in pairs * repeats], 1, 1)[0]
            return repeats * flops / seconds / 1e9

        return call

    rng = np.random.default_rng(0)

    def array(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32)

    w = Workload()
    tokens = w.batch * w.positions
    step = [(tokens, w.width, w.width), (tokens, w.width, w.feed_forward), (tokens, w.feed_forward, w.width)]
    cases = {
        NUMPY: rate([(1024, 1024, 1024)], lambda a, b: a @ b.T, array),
        MLX: rate([(1024, 1024, 1024)], lambda a, b: mx.eval(a @ b.T), lambda m, n: mx.array(array(m, n))),
        SHAPES: rate(step, lambda a, b: mx.eval(a @ b.T), lambda m, n: mx.array(array(m, n))),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(5):
        for name, call in cases.items():
            found[name].append(call())
    return {"values": found}


def student() -> dict[str, Any]:
    """The bundled models: 2 steps beside 16 guided ones, 8 pictures at once, and sCM's tangent."""
    models = {name: load(name) for name in ("emoji", "emoji-2step")}

    def paint(name: str, seeds: range, **settings: Any) -> Callable[[], object]:
        loaded = models[name]
        return lambda: generate_images(loaded, PROMPT, seeds, GenerationSettings(**settings))

    cases = {
        TWO: paint("emoji-2step", range(1)),
        SIXTEEN: paint("emoji", range(1), sampler="midpoint", steps=16),
        EIGHT: paint("emoji-2step", range(BATCH), batch_size=BATCH),
        ONE_BY_ONE: paint("emoji-2step", range(BATCH), batch_size=1),
    }
    seconds = in_turns(cases, {TWO: 10, SIXTEEN: 3, EIGHT: 5, ONE_BY_ONE: 3})
    tangent = tangent_cases(models["emoji-2step"], PICTURES)
    return {
        "seconds": seconds | in_turns({name: c.call for name, c in tangent.items()}, {VALUE: 8, TANGENT: 8})
    }


def in_turns(cases: dict[str, Callable[[], object]], repeats: dict[str, int]) -> dict[str, list[float]]:
    """Warm up twice, then each case `repeats` times, in three turns."""
    found: dict[str, list[float]] = {name: timed(call, 2, 0) for name, call in cases.items()}
    for _ in range(3):
        for name, call in cases.items():
            found[name] += timed(call, 0, -(-repeats[name] // 3))
    return found


def prefix() -> dict[str, Any]:
    """One guided denoising step of 64 image tokens behind a short and a long prefix."""
    model = Transfusion(model_config(Workload()))
    mx.eval(model.parameters())
    x, angle = mx.random.normal((2, *model.latent_shape)), mx.full((2,), 0.7)
    cases: dict[str, Callable[[], object]] = {}
    for name, length in ((SHORT, 16), (LONG, 2048)):
        ids = np.random.default_rng(0).integers(6, 2000, (1, length)).astype(np.int32)
        cache = model.prefill(ids, np.array([length]))[1].select([0, 0])
        mx.eval(cache.layers)
        cases[name] = lambda cache=cache: mx.eval(model.velocity(x, angle, cache))  # type: ignore[misc]
    with lanes(2):
        return {"seconds": in_turns(cases, {SHORT: 12, LONG: 6})}


def start() -> dict[str, Any]:
    """The command from nothing: its help beside a bare typer program's, and a picture by the bundled student."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text("import typer\napp = typer.Typer()\n@app.command()\ndef f(a: int = 1): ...\napp()\n")

        def run(*command: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, *command], capture_output=True, check=True)

        pictures = iter(range(1000))

        def paint() -> None:
            file = str(Path(folder) / f"{next(pictures)}.png")
            run("-m", "mlx_transfusion", "generate", PROMPT, "--output", file)()

        cases = {
            OURS_HELP: run("-m", "mlx_transfusion", "--help"),
            BARE_HELP: run(str(bare), "--help"),
            FIRST: paint,
        }
        return {"seconds": in_turns(cases, {OURS_HELP: 6, BARE_HELP: 6, FIRST: 3})}


def config(folder: Path, steps: int, model: dict[str, Any], batch: int, pictures: int = 64) -> TrainConfig:
    """A training of random pictures with captions, from random weights."""
    tokenizer = load("emoji").tokenizer.save(folder)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(pictures):
        save_png(folder / f"{i}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
        lines.append(json.dumps({"image": f"{i}.png", "text": "a red heart with a smiling face"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return TrainConfig(
        output=str(folder / "out"), tokenizer=str(tokenizer), model=model, steps=steps, batch_size=batch,
        data=DataConfig((SourceConfig(str(folder / "rows.jsonl")),)), sequence_length=96, log_every=1,
        save_every=1 << 30, optimizer=OptimizerConfig(warmup=1),
    )  # fmt: skip


def data() -> dict[str, Any]:
    """The share of a training step that waits for pictures and captions, in the loop itself."""
    w = Workload()
    model = {
        "hidden_size": w.width, "num_hidden_layers": w.layers, "num_attention_heads": w.heads,
        "intermediate_size": w.feed_forward, "patch_size": w.patch_size,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = config(Path(folder), 10, model, w.batch)
        Trainer(run).run()
        rows = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    return {"values": {"waiting": [row["data_wait"] for row in rows[3:] if "data_wait" in row]}}


def memory() -> dict[str, Any]:
    """Growth over 1,000 steps of a small model and 200 pictures of the bundled one; the estimate beside the peak."""
    marks: dict[int, dict[str, float]] = {}

    class Watched(Trainer):
        def _after_step(self, *rest: Any) -> None:
            super()._after_step(*rest)
            if self.state.step in (STEPS // 10, STEPS):
                marks[self.state.step] = held()

    small = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "patch_size": 8,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Watched(config(Path(folder), STEPS, small, 4)).run()
    grown = {
        f"{STEPS} steps, {name}": marks[STEPS][name] / marks[STEPS // 10][name] - 1 for name in marks[STEPS]
    }
    loaded = load("emoji-2step")
    before: dict[str, float] = {}
    for i in range(SERVED):
        generate_images(loaded, PROMPT, i)
        if i == SERVED // 10:
            before = held()
    after = held()
    grown |= {f"{SERVED} pictures, {name}": after[name] / before[name] - 1 for name in after}
    case = memory_of(CASES["full, batch 8"])
    return {"values": {**{k: [v] for k, v in grown.items()}, "estimate": [case["estimate"] / case["peak"]]}}


def held() -> dict[str, float]:
    """Bytes in arrays, and in this process as the system counts them (on Linux; elsewhere its peak so far)."""
    now = Path("/proc/self/statm")
    if now.exists():
        process = int(now.read_text().split()[1]) * resource.getpagesize()
    else:
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"arrays": float(mx.get_active_memory()), "process": float(process)}


PARTS = {part.__name__: part for part in (matmul, student, prefix, start, data, memory)}

if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(json.dumps(PARTS[sys.argv[1]]()))
