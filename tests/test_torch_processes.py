"""Two processes (gloo, FSDP2): a run that is killed goes on, on one process or on two, from its last checkpoint.

The processes are started here with the variables that torchrun sets, which saves its seconds;
`examples/emoji/two_processes.py` goes through torchrun.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402
from torch_tools import finish, run_losses, start  # noqa: E402

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


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert all(p.poll() is None for p in processes), [p.communicate()[1] for p in processes]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two processes that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    finish(start(toml, output, 2))
    return output


def test_one_of_two_is_killed_and_two_go_on_exactly(toml: Path, whole: Path, tmp_path: Path) -> None:
    both = start(toml, tmp_path, 2, SLOW_STEPS)
    wait_for(lambda: bool(checkpoints(tmp_path / "torch")), both)
    both[1].send_signal(signal.SIGKILL)
    both[1].communicate()
    both[0].communicate(timeout=240)  # it cannot go on alone, and must not wait for ever
    assert both[0].returncode != 0
    done = checkpoints(tmp_path / "torch")[-1]
    assert done.name != "step-00000008"
    assert f"resumed from {done} (2 processes wrote it)" in finish(start(toml, tmp_path, 2))
    assert run_losses(tmp_path) == run_losses(whole)
    first, second = (
        dict(read_weights(export(out / "torch/step-00000008", tmp_path / name)))
        for name, out in (("a", whole), ("b", tmp_path))
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_both_are_killed_while_they_save_and_one_goes_on(toml: Path, whole: Path, tmp_path: Path) -> None:
    both = start(toml, tmp_path, 2, STUCK_WRITE)
    unfinished = tmp_path / "torch/.writing-step-00000004"
    wait_for(lambda: (unfinished / ".metadata").is_file(), both)
    for p in both:
        p.kill()
        p.communicate()
    assert [p.name for p in checkpoints(tmp_path / "torch")] == ["step-00000002"]
    assert "step-00000002 (2 processes wrote it)" in finish(start(toml, tmp_path, 1))
    assert not unfinished.exists()
    assert run_losses(tmp_path) == pytest.approx(run_losses(whole), rel=1e-5)
