"""Two processes (gloo, FSDP2): a run that is killed goes on, on one process or on two, from its last checkpoint.

The processes are forked from one with the variables that torchrun sets, which saves its seconds and PyTorch's;
`examples/emoji/two_processes.py` goes through torchrun.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402
from torch_tools import finish, job, run_losses, start, started  # noqa: E402

from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch.checkpoint import checkpoints  # noqa: E402
from mlx_transfusion.torch.export import export  # noqa: E402
from mlx_transfusion.torch.folder import read_weights  # noqa: E402

SLOW_STEPS = """
import time
from mlx_transfusion.torch.loader import Loader
load = Loader.load
Loader.load = lambda self, step: (time.sleep(0.3 * (step > 2)), load(self, step))[1]
"""
STUCK_IN_BACKGROUND = """
import time
from torch.distributed.checkpoint import FileSystemWriter
write = FileSystemWriter.write_data
def stuck(self, *arguments):
    if "step-00000004" in str(self.path):
        time.sleep(60)
    return write(self, *arguments)
FileSystemWriter.write_data = stuck
"""
STUCK_WRITE = """
import time, mlx_transfusion.torch.checkpoint as checkpoint
write = checkpoint.Saver._complete
def stuck(self, temporary, target, record):
    if record["step"] > 2:
        time.sleep(60)
    return write(self, temporary, target, record)
checkpoint.Saver._complete = stuck
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("torch"), tiny_tokenizer)


def wait_for(condition: Callable[[], bool], launched: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert launched.poll() is None, launched.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two processes that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    finish(start(job(toml, output, 2, "steps=8")))
    return output


def test_one_of_two_is_killed_and_two_go_on_exactly(toml: Path, whole: Path, tmp_path: Path) -> None:
    both = start(job(toml, tmp_path, 2, "steps=8", before=SLOW_STEPS))
    _, second = started(both)
    wait_for(lambda: bool(checkpoints(tmp_path / "torch")), both)
    os.kill(second, signal.SIGKILL)
    told = both.communicate(timeout=240)[1]  # the first cannot go on alone, and must not wait for ever
    assert re.search(rf"ended with \[[12], -{signal.SIGKILL:d}\]", told)
    assert re.search("^error: .*another process of the run is gone", told, re.MULTILINE)
    done = checkpoints(tmp_path / "torch")[-1]
    assert done.name != "step-00000008"
    assert f"resumed from {done} (2 processes wrote it)" in finish(start(job(toml, tmp_path, 2, "steps=8")))
    assert run_losses(tmp_path) == run_losses(whole)
    a, b = (
        dict(read_weights(export(out / "torch/step-00000008", tmp_path / name)))
        for name, out in (("a", whole), ("b", tmp_path))
    )
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_both_are_killed_while_they_save_and_one_goes_on(toml: Path, whole: Path, tmp_path: Path) -> None:
    both = start(job(toml, tmp_path, 2, "steps=8", before=STUCK_WRITE))
    ids = started(both)
    unfinished = tmp_path / "torch/.writing-step-00000004"
    wait_for(lambda: (unfinished / ".metadata").is_file(), both)
    for one in ids:
        os.kill(one, signal.SIGKILL)
    both.communicate(timeout=240)
    assert [p.name for p in checkpoints(tmp_path / "torch")] == ["step-00000002"]
    assert "step-00000002 (2 processes wrote it)" in finish(start(job(toml, tmp_path, 1, "steps=8")))
    assert not unfinished.exists()
    assert run_losses(tmp_path) == pytest.approx(run_losses(whole), rel=1e-5)


def test_both_are_killed_while_they_save_in_the_background(toml: Path, whole: Path, tmp_path: Path) -> None:
    """Training goes on beside the writing; what was being written does not count."""
    flags = ("--background-save",)
    both = start(job(toml, tmp_path, 2, "steps=8", before=STUCK_IN_BACKGROUND, flags=flags))
    ids = started(both)
    metrics, unfinished = tmp_path / "metrics.jsonl", tmp_path / "torch/.writing-step-00000004"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 4, both)
    assert unfinished.is_dir()
    for one in ids:
        os.kill(one, signal.SIGKILL)
    both.communicate(timeout=240)
    assert [p.name for p in checkpoints(tmp_path / "torch")] == ["step-00000002"]
    assert "step-00000002 (2 processes wrote it)" in finish(start(job(toml, tmp_path, 1, "steps=8")))
    assert run_losses(tmp_path) == pytest.approx(run_losses(whole), rel=1e-5)


def test_the_newest_checkpoint_is_damaged(toml: Path, whole: Path, tmp_path: Path) -> None:
    """In a part that the second process checks: both go back to the one before, and say so."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    newest = checkpoints(tmp_path / "torch")[-1]
    names = sorted(json.loads((newest / "state.json").read_text())["files"])
    part = newest / names[1]
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    told = finish(start(job(toml, tmp_path, 2, "steps=8")))
    assert (
        f"{newest}: damaged ({names[1]} does not have the check sum it was written with): going back" in told
    )
    assert "resumed from" in told
    assert run_losses(tmp_path) == run_losses(whole)
