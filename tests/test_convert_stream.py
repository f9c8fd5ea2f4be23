"""Converting in little memory, and leaving nothing behind that looks finished."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
import toy_family
from convert_package import assert_same, module

from mlx_transfusion.errors import UserError

ROOT = Path(__file__).parents[1]
run, account, shards, quantize = module("run"), module("account"), module("shards"), module("quantize")
OPTIONS = quantize.Options()


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    """The script that measures."""
    spec = importlib.util.spec_from_file_location("convert_memory", ROOT / "benchmarks" / "convert_memory.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("bits", [None, "4"])
@pytest.mark.parametrize("gigabytes", [0.15])
def test_the_peak_is_a_few_tensors(tmp_path: Path, memory: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                   gigabytes: float, bits: str | None) -> None:  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = memory.make(tmp_path / "in", gigabytes)
    if shutil.disk_usage(tmp_path).free < 1.5 * gigabytes * 1e9:
        pytest.skip("too little disk here for the converted model")
    file = source / "model.safetensors"
    assert file.stat().st_blocks * 512 < 1e7 < file.stat().st_size  # a hole takes no room
    base = memory.peak(source, None, None)
    done = memory.peak(source, tmp_path / "out", bits)
    assert base["checkpoint"] > 0.8e9 * gigabytes
    over = done["peak"] - base["peak"]
    assert over < 3 * done["largest"] + 64e6
    assert over < 0.5 * done["checkpoint"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 40])
def test_shards_hold_what_one_file_would(tmp_path: Path, limit: int) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in"))
    done = account.account(plan, OPTIONS)
    whole = run.convert(done, tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.mkdir()
    with shards.ShardWriter(cut, done.stored, done.parameters, limit) as writer:
        for job in done.jobs:
            for array in run.converted(job) if job.stored else []:
                writer.write(array)
    from mlx_transfusion.model_io import read_weights

    assert_same(read_weights(cut), mx.load(str(whole / "model.safetensors")))
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) == {1: len(done.stored), 1 << 40: 1}.get(limit, len(files))
    for file in files:
        stored = mx.load(str(file))
        assert len(stored) == 1 or sum(v.nbytes for v in stored.values()) <= limit


def test_what_was_announced_must_come(tmp_path: Path) -> None:
    done = account.account(toy_family.plan(toy_family.write(tmp_path / "in")), OPTIONS)
    with (
        pytest.raises(ValueError, match="not as announced"),
        shards.ShardWriter(tmp_path, done.stored, 1) as writer,
    ):
        writer.write(mx.zeros(3))
    with (
        pytest.raises(ValueError, match="not all tensors"),
        shards.ShardWriter(tmp_path, done.stored, 1) as writer,
    ):
        writer.write(run.converted(done.jobs[0])[0])
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_too_little_disk_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = account.account(toy_family.plan(toy_family.write(tmp_path / "in")), OPTIONS)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage(1 << 40, 0, done.nbytes + 1000))
    with pytest.raises(UserError, match=r"out: needs 0\.00 GB and the disk has 0\.00 GB free: make room"):
        run.convert(done, tmp_path / "new" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage(1 << 40, 0, done.nbytes + run.SPARE))
    run.convert(done, tmp_path / "new" / "out")


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int,
                                        error: BaseException) -> None:  # fmt: skip
    done = account.account(toy_family.plan(toy_family.write(tmp_path / "in")), OPTIONS)
    left = [at]
    write = shards.ShardWriter.write

    def fail(writer: Any, array: mx.array) -> None:
        if not left[0]:
            raise error
        left[0] -= 1
        write(writer, array)

    monkeypatch.setattr(shards.ShardWriter, "write", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"cannot write the model: No space left|^$"):
        run.convert(done, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


SLOW = """
import os, sys, time
sys.path.insert(0, {tests!r})
import toy_family
from convert_package import module
from pathlib import Path
run, account, quantize = module("run"), module("account"), module("quantize")
folder = Path(sys.argv[1])
done = account.account(toy_family.plan(toy_family.write(folder / "in")), quantize.Options())
def progress(written, name):
    if written:
        print("writing", flush=True)
        time.sleep(60)
run.convert(done, folder / "out", progress)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_nothing_finished(tmp_path: Path, stop: signal.Signals) -> None:
    code = SLOW.format(tests=str(ROOT / "tests"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(stop)
    process.wait(20)
    process.stdout.close()
    left = {p.name for p in tmp_path.iterdir()} - {"in"}
    if stop == signal.SIGINT:
        assert not left
    for name in left:  # nothing runs after SIGKILL
        assert name.startswith(".out.partial-")
        assert not (tmp_path / name / "config.json").exists()


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    before = {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    run.convert(account.account(toy_family.plan(source), OPTIONS), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before
    for taken in ("in", "in/model.safetensors"):
        with pytest.raises(UserError, match="exists already: choose another output folder"):
            run.convert(account.account(toy_family.plan(source), OPTIONS), tmp_path / taken)
    assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before


def test_progress_counts_bytes(tmp_path: Path) -> None:
    done = account.account(toy_family.plan(toy_family.write(tmp_path / "in")), OPTIONS)
    seen: list[tuple[int, str]] = []
    run.convert(done, tmp_path / "out", lambda *call: seen.append(call))
    counts = [n for n, _ in seen]
    assert counts == sorted(counts)
    assert seen[-1] == (done.nbytes, "")
    assert {name for _, name in seen[:-1]} == {job.entry.source for job in done.jobs}
