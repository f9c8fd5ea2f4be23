"""Training in processes of its own: two together, killed ones, and Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_training import (
    MUON,
    Arrays,
    MakeConfig,
    assert_close,
    assert_same,
    environment,
    free_ports,
    launch,
    losses_of,
    metrics,
    state,
)

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.trainer import Trainer, train

LAUNCHED = """
import sys
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.trainer import train
train(load_train_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon"])
def test_two_processes_equal_one(config: MakeConfig, toml: Path, tmp_path: Path, name: str) -> None:
    overrides = [*MUON, "batch_size=7", "steps=4", "optimizer.muon_learning_rate=0.01"]
    one = train(config(*overrides, output="one"))
    (tmp_path / "run.py").write_text(LAUNCHED)
    two = tmp_path / "two"
    printed = launch(tmp_path / "run.py", toml, *overrides, f"output={two}")
    found = ckpt.checkpoints(two / "checkpoints")
    assert found, printed
    assert found[-1].name == one.name
    assert [r["step"] for r in metrics(two)] == [1, 2, 3, 4]  # only one of them wrote
    for a, b in zip(losses_of(tmp_path / "one"), losses_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    wanted, got = state(one), state(found[-1])
    assert_close({k: v for k, v in wanted.items() if "optimizer" not in k}, got, 1e-4)


DYING = """
import os, signal
from mlx_transfusion.training.trainer import Trainer
after_step = Trainer._after_step

def die(self, *args):
    after_step(self, *args)
    if self.state.step == 3 and self.group.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._after_step = die
"""


class Group:
    """One of several processes."""

    def __init__(self, rank: int = 0, size: int = 7) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (3, 2)])
def test_every_document_goes_to_one_process(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, processes: int, parts: int
) -> None:
    trainer = Trainer(config("batch_size=7", f"accumulate={parts}"))
    numbers: list[int] = []
    load = trainer.step.load

    def noting(data: Any, documents: Any) -> Any:
        numbers.extend(d.number for d in documents)
        return load(data, documents)

    monkeypatch.setattr(trainer.step, "load", noting)
    totals = set()
    for step in range(2):
        for rank in range(processes):
            trainer.group = Group(rank, processes)  # type: ignore[assignment]
            loaded = trainer._load(step)
            totals.add((step, loaded.text_total, loaded.image_total))
    assert sorted(numbers) == list(range(14))
    assert len(totals) == 2  # every process divides by the totals of the whole step


def test_more_processes_or_parts_than_documents(config: MakeConfig) -> None:
    trainer = Trainer(config())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "init", Group)
        with pytest.raises(UserError, match="batch_size 6 is too small for 7 processes"):
            Trainer(trainer.config)


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started pytest without it
from mlx_transfusion.cli import main
main(["train", sys.argv[1], *(part for item in sys.argv[2:] for part in ("--set", item))])
"""


@pytest.mark.slow
def test_one_process_dying_ends_the_job(toml: Path, tmp_path: Path) -> None:
    """The others say so in one line, if the launcher lets them, and end too; the last checkpoint is whole."""
    (tmp_path / "run.py").write_text(DYING + RUN)
    printed = launch(tmp_path / "run.py", toml, "steps=100", f"output={tmp_path / 'out'}")
    assert "rank 1 exited" in printed or "error: another process of this run has ended" in printed
    assert "Traceback" not in printed
    (saved,) = ckpt.checkpoints(tmp_path / "out" / "checkpoints")
    assert ckpt.read_record(saved)["step"] == 2
    load(saved)


SLOWLY = """
import time
from mlx_transfusion.training.trainer import Trainer
after_step = Trainer._after_step
Trainer._after_step = lambda self, *args: (after_step(self, *args), time.sleep(0.3))[0]
"""


WAITING = """
import time
from mlx_transfusion.training.interrupt import Interrupt
from mlx_transfusion.training.trainer import Trainer
heard, note, after_step = [], Interrupt._note, Trainer._after_step

def hear(self, *args):
    heard.append(1)
    note(self, *args)

def wait(self, *args):
    after_step(self, *args)
    while self.state.step == 2 and self.group.rank() == self.group.size() - 1 and not heard:
        time.sleep(0.01)

Interrupt._note, Trainer._after_step = hear, wait
"""


def start(before: str, toml: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """`mlx-transfusion train` in a process of its own, after the lines `before`."""
    return subprocess.Popen(
        [sys.executable, "-c", before + RUN, str(toml), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | variables,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_sigkill_at_random_moments(
    toml: Path, tmp_path: Path, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    """Real processes: killed while a checkpoint is being written, and at random moments between."""
    output = tmp_path / "out"
    folder = output / "checkpoints"
    dice = random.Random(1)
    launches = [*MUON, "save_every=1", f"output={output}"]
    killed = 0
    for k in range(4):
        process = start(SLOWLY, toml, *launches)
        done = len(ckpt.checkpoints(folder)) and ckpt.checkpoints(folder)[-1].name

        def progressed(done: Any = done) -> bool:
            found = ckpt.checkpoints(folder)
            return bool(found) and found[-1].name != done

        if k % 2:  # in the middle of the first save
            wait_for(
                process,
                lambda: folder.is_dir() and any(p.name.startswith(".writing-step") for p in folder.iterdir()),
            )
        else:
            wait_for(process, progressed)
            time.sleep(dice.uniform(0, 0.03))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for path in ckpt.checkpoints(folder):
            load(path)
            assert ckpt.read_record(path)["step"] == int(path.name[-8:])
    assert killed >= 2
    last = train(load_train_config(toml, launches))
    assert_same(uninterrupted[0], state(last))
    assert losses_of(output) == uninterrupted[1]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000006"]


def test_ctrl_c_saves_the_step_in_hand_and_exits_130(
    toml: Path, tmp_path: Path, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    output = tmp_path / "out"
    overrides = [*MUON, "save_every=100", f"output={output}"]
    process = start(WAITING, toml, *overrides)
    log = output / "metrics.jsonl"
    wait_for(process, lambda: log.exists() and log.read_text().count("\n") == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (saved,) = ckpt.checkpoints(output / "checkpoints")
    assert ckpt.read_record(saved)["step"] == 3
    last = train(load_train_config(toml, overrides))
    assert_same(uninterrupted[0], state(last))
    assert losses_of(output) == uninterrupted[1]


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_stops_both(toml: Path, tmp_path: Path) -> None:
    """They agree on the step after which they stop: one alone would leave the other waiting for its gradients."""
    port = free_ports()
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    overrides = [*MUON, "save_every=100", f"output={tmp_path / 'out'}"]
    pair = [start(WAITING, toml, *overrides, MLX_RANK=str(r), MLX_HOSTFILE=str(hosts)) for r in range(2)]
    try:
        log = tmp_path / "out" / "metrics.jsonl"
        wait_for(pair[1], lambda: log.exists() and log.read_text().count("\n") == 2)
        pair[1].send_signal(signal.SIGINT)
        for process in pair:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 130, err
            assert "Traceback" not in err
    finally:
        for process in pair:
            process.kill()
    (saved,) = ckpt.checkpoints(tmp_path / "out" / "checkpoints")
    assert ckpt.read_record(saved)["step"] == 3


@pytest.mark.parametrize("where", ["gradients", "update"])
def test_ctrl_c_in_the_middle_of_a_step(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The optimiser is a step ahead of the weights while a step is under way: that must not be saved."""
    run = config(*MUON, "save_every=100")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = Trainer(run)
    original = getattr(trainer.step, where)

    def interrupted(*args: Any) -> Any:
        result = original(*args)
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(trainer.step, where, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    (saved,) = ckpt.checkpoints(Path(run.output) / "checkpoints")
    assert ckpt.read_record(saved)["step"] in (3, 4)
    assert_same(uninterrupted[0], state(train(run)))


def test_a_second_ctrl_c_stops_at_once(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("save_every=100", "steps=100")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = Trainer(run)
    original = trainer.step.update

    def twice(*args: Any) -> Any:
        if trainer.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(trainer.step, "update", twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ckpt.checkpoints(Path(run.output) / "checkpoints") == []
