"""A training run of seconds: generated captions and pictures, one TOML file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.trainer import Trainer

Arrays = dict[str, np.ndarray]
MakeConfig = Callable[..., TrainConfig]
MUON = ["optimizer.name=muon", "optimizer.muon_learning_rate=0.02", "ema=0.8"]
VARIES = {"tokens_per_second", "data_wait", "peak_memory_gb"}

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "happy": (240, 220, 60)}
SHAPES = ["heart", "star", "moon", "face"]

RUN: dict[str, Any] = {
    "output": "runs", "tokenizer": "tokenizer.model", "steps": 6, "batch_size": 6, "sequence_length": 32,
    "log_every": 1, "save_every": 2, "ema": 0.9,
}  # fmt: skip
MODEL = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 48
image_height = 8
image_width = 8
patch_size = 4
time_frequencies = 8
max_position = 64
"""
DATA = """
[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "texts.jsonl"
"""
OPTIMIZER = """
[optimizer]
learning_rate = 3e-3
warmup = 2
"""


def top(**changes: Any) -> str:
    """The settings of a run that stand above the tables of its TOML file."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in (RUN | changes).items())


TOML = top() + MODEL + DATA + OPTIMIZER


def write_run(folder: Path, tokenizer: Tokenizer) -> Path:
    """Sixteen captioned pictures, eight texts, a tokenizer, and `train.toml`, whose path is returned."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    pairs = []
    for colour, rgb in COLOURS.items():
        for k, shape in enumerate(SHAPES):
            pixels = np.full((8, 8, 3), 255, np.uint8)
            pixels[k : k + 4, 2:7] = rgb
            name = f"{colour}-{shape}.png"
            Image.fromarray(pixels).save(pictures / name)
            pairs.append({"image": name, "text": f"{colour} {shape}"})
    texts = [{"text": f"{c} {s} {s}"} for c in ("big", "sad") for s in SHAPES]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "texts.jsonl", texts)
    tokenizer.save(folder)
    toml = folder / "train.toml"
    toml.write_text(TOML)
    return toml


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def state(checkpoint: Path) -> Arrays:
    """All arrays of a checkpoint (weights, average, optimiser), under names that tell the files apart."""
    return {
        f"{file.name}:{name}": np.array(value)
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, value in mx.load(str(file)).items()
    }


def assert_same(a: Arrays, b: Arrays) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def assert_close(a: Arrays, b: Arrays, tolerance: float) -> None:
    for name, value in a.items():
        assert np.linalg.norm(b[name] - value) <= tolerance * np.linalg.norm(value) + 1e-9, name


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[dict[str, Any]]:
    """The metrics that must repeat exactly."""
    return [{k: v for k, v in row.items() if k not in VARIES} for row in metrics(output)]


class Crash(BaseException):
    """Nothing after it is done, as after SIGKILL."""


def crash_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer._after_step

    def after_step(self: Trainer, *args: Any) -> None:
        original(self, *args)
        if self.state.step == step:
            raise Crash

    monkeypatch.setattr(Trainer, "_after_step", after_step)


def free_ports() -> int:
    """A port that is free together with its successor."""
    for _ in range(50):
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = int(a.getsockname()[1])
            try:
                b.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free ports")


def launch(script: Path, *arguments: object, processes: int = 2) -> str:
    """Run a script by `mlx.launch`, and return what it printed. Skips the test where there is no launcher."""
    launcher = next((f.locate() for f in files("mlx") or () if f.name == "mlx.launch"), None)
    if launcher is None:
        pytest.skip("mlx was installed without mlx.launch")
    options = ["-n", processes, "--backend", "ring", "--starting-port", free_ports(), "--"]
    command = [sys.executable, launcher, *options, sys.executable, script, *arguments]
    # stdin stays open: the launcher reads it without end, and takes all of a core when there is nothing to read
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(),
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return output.decode()


def environment() -> dict[str, str]:
    """That of a new process which finds the package where this one did."""
    root = str(Path(mlx_transfusion.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
