"""TensorBoard and Weights & Biases beside `metrics.jsonl`: stand-ins take the place of the packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_transfusion.errors import UserError
from mlx_transfusion.training import metrics
from mlx_transfusion.training.metrics import MetricsLog


class Writer:
    """What TensorBoard's SummaryWriter does, as far as it is used."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("module", ["torch.utils.tensorboard", "tensorboardX"])
def test_tensorboard_when_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """A resumed run takes back what was logged of the steps that it repeats."""
    writers: list[Writer] = []

    def make(*args: Any, **kwargs: Any) -> Writer:
        writers.append(Writer(*args, **kwargs))
        return writers[-1]

    monkeypatch.setattr(metrics, "find_spec", lambda name: object() if module.startswith("torch") else None)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(SummaryWriter=make))
    log = MetricsLog(tmp_path, 4)
    log.write(5, {"text_loss": 2.5, "image_loss": 0.5})
    log.close()
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 5)
    assert writer.scalars == [("text_loss", 2.5, 5), ("image_loss", 0.5, 5)]
    assert writer.closed


def test_without_tensorboard_there_is_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"text_loss": 2.5})
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class Run:
    """What wandb.init gives, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Run, dict[str, Any]]]:
    """The runs that were started and how."""
    runs: list[tuple[Run, dict[str, Any]]] = []

    def init(**how: Any) -> Run:
        runs.append((Run(), how))
        return runs[-1][0]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    return runs


def test_a_resumed_run_is_the_same_run(started: list[tuple[Run, dict[str, Any]]], tmp_path: Path) -> None:
    for step in (0, 1):
        log = MetricsLog(tmp_path, step)
        log.write(step + 1, {"loss": 2.5})
        log.close()
    (first, how), (_, again) = started
    assert first.logged == [{"step": 1, "loss": 2.5}]
    assert first.finished
    assert how == again
    assert how["resume"] == "allow"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_nothing_is_sent_unless_asked_for(
    started: list[tuple[Run, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT")
    MetricsLog(tmp_path, 0).close()
    assert not started


def test_asked_for_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsLog(tmp_path, 0)
