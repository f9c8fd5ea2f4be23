"""Exact resume after any kind of stop inside one process, and what a bad disk or a bad number leaves."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_training import (
    MUON,
    Arrays,
    Crash,
    MakeConfig,
    assert_same,
    crash_after,
    losses_of,
    metrics,
    state,
)

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.trainer import train


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_run(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]], stop: int
) -> None:
    run = config(*MUON)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, stop)
        with pytest.raises(Crash):
            train(run)
    last = train(run)
    assert_same(uninterrupted[0], state(last))
    assert losses_of(Path(run.output)) == uninterrupted[1]
    assert [p.name for p in ckpt.checkpoints(last.parent)] == ["step-00000004", "step-00000006"]


def test_adamw_in_parts_resumes_exactly(config: MakeConfig) -> None:
    overrides = ["steps=4", "accumulate=2", "dtype=bfloat16"]
    whole = train(config(*overrides, output="whole"))
    run = config(*overrides)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            train(run)
    assert_same(state(whole), state(train(run)))


def test_killed_at_random_operations_on_files(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    """One run, killed again and again wherever it touches the disk, ends as if nothing had happened."""
    run = config(*MUON, "save_every=1")
    dice = random.Random(0)
    kills = 0
    while True:
        left = dice.randrange(1, 90)

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Crash
                return call(*args, **kwargs)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            patch.setattr(mx, "save_safetensors", wrap(mx.save_safetensors))
            try:
                last = train(run)
                break
            except Crash:
                kills += 1
        for path in ckpt.checkpoints(Path(run.output) / "checkpoints"):
            assert load(path).config.hidden_size == 32
        assert kills < 50
    assert kills >= 2
    assert_same(uninterrupted[0], state(last))
    assert losses_of(Path(run.output)) == uninterrupted[1]


def test_a_full_disk_stops_the_run_and_loses_nothing(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    run = config(*MUON)
    folder = Path(run.output) / "checkpoints"
    real = mx.save_safetensors

    def full(path: str, *args: Any) -> None:
        if "step-00000004" in path and path.endswith("optimizer.safetensors"):
            real(path, *args)
            os.truncate(path, 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        with pytest.raises(
            UserError, match=r"step-00000004: cannot save the checkpoint \(disk full\)"
        ) as error:
            train(run)
    assert "\n" not in str(error.value)
    assert [p.name for p in folder.iterdir()] == ["step-00000002"]
    assert_same(uninterrupted[0], state(train(run)))
    assert losses_of(Path(run.output)) == uninterrupted[1]


def test_metrics_on_a_full_disk(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space left"):
        train(run)


def test_metrics_cut_off_in_the_middle_of_a_line(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    run = config(*MUON)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            train(run)
    log = Path(run.output) / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 4, "text_lo')
    train(run)
    assert losses_of(Path(run.output)) == uninterrupted[1]


def test_a_finished_run_is_left_as_it_is(config: MakeConfig) -> None:
    run = config("steps=2")
    last = train(run)
    before = {p.name: p.stat().st_mtime_ns for p in last.iterdir()}
    assert train(run) == last
    assert {p.name: p.stat().st_mtime_ns for p in last.iterdir()} == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(config: MakeConfig) -> None:
    run = config(*MUON, "save_every=1")
    real = DataSet.batch

    def poisoned(self: DataSet, documents: Any) -> Any:
        batch = real(self, documents)
        if documents[0].number >= 4 * 6:  # the fifth step
            batch.noise[0, 0, 0, 0] = np.inf
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSet, "batch", poisoned)
        with pytest.raises(
            UserError, match=r"step 5: not finite any more .*the last checkpoint is good"
        ) as error:
            train(run)
    assert "\n" not in str(error.value)
    found = ckpt.checkpoints(Path(run.output) / "checkpoints")
    assert [p.name for p in found] == ["step-00000003", "step-00000004"]
    assert all(np.isfinite(v).all() for v in state(found[-1]).values())
    assert [r["step"] for r in metrics(Path(run.output))] == [1, 2, 3, 4]
