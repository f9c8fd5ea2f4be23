"""A run of PyTorch from end to end: two processes train on the emoji, are killed, one goes on, MLX paints.

    python examples/emoji/two_processes.py OUTPUT [--steps 200] [--set KEY=VALUE ...]

What a cluster does at full scale, on two CPU cores: FSDP2 over gloo, `kill -9` of everything as soon as there is a
checkpoint, resuming on another number of processes, conversion to a model folder, a picture.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
SMALL = [
    "model.hidden_size=64", "model.num_hidden_layers=4", "model.intermediate_size=176", "optimizer.name=adamw",
    "optimizer.warmup=20", "batch_size=20", "log_every=1", "valid_every=0", "sample.every=0",
]  # fmt: skip
TRAIN = ["-m", "mlx_transfusion.torch.train", str(HERE / "train.toml")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    run, model, picture = given.output / "run", given.output / "model", given.output / "picture.png"
    changes = [
        f"output={run}",
        *SMALL,
        f"steps={given.steps}",
        f"save_every={max(1, given.steps // 4)}",
        *given.set,
    ]
    flags = [word for change in changes for word in ("--set", change)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    killed = train_and_kill([sys.executable, *torchrun, *TRAIN, *flags], run / "torch")
    print(f"killed two processes behind {killed.name}")
    python("train on one process", *TRAIN, *flags)
    last = max((run / "torch").glob("step-*"))
    python("convert", "-m", "mlx_transfusion.torch.export", str(last), str(model))
    python("paint", "-m", "mlx_transfusion", "generate", "red heart", "--model", str(model),
           "--output", str(picture), "--overwrite")  # fmt: skip
    print(f"{last.name} paints {picture}")


def train_and_kill(command: list[str], checkpoints: Path) -> Path:
    """Start a run, end all of its processes at once when it has a checkpoint, and return that."""
    launched = subprocess.Popen(command)
    while not (found := sorted(checkpoints.glob("step-*"))):
        if launched.poll() is not None:
            sys.exit(f"the run of two processes ended by itself with code {launched.returncode}")
        time.sleep(0.02)
    # Each of torchrun's workers has a process group of its own, so no signal to a group reaches all.
    workers = children(launched.pid)
    launched.kill()
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    launched.wait()
    return found[-1]


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # others come and go meanwhile
                pairs.append((file.parent.name, file.read_text().rpartition(")")[2].split()[1]))
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True)
        pairs = [(line.split()[0], line.split()[1]) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, started_by in pairs if int(started_by) == parent]


def python(what: str, *arguments: str) -> None:
    print(what, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
