"""`bench`: what is timed, how, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_transfusion.bench import measure as measuring
from mlx_transfusion.bench.cases import picture_cases, text_cases
from mlx_transfusion.bench.measure import Case, measure, table
from mlx_transfusion.bench.training_cases import training_cases
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.quantization import parameter_count


def test_rounds_take_turns_and_rates_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def case(name: str, seconds: list[float]) -> Any:
        def call() -> None:
            clock[0] += seconds.pop(0)
            calls.append(name)

        return call

    cases = {
        "slow": Case(case("slow", [9.0, 1.0, 3.0, 2.0])),
        "read": Case(case("read", [9.0, 0.5, 0.25, 1.0]), tokens=10),
    }
    slow, read = measure(cases, 3)
    assert calls == ["slow", "read"] * 4  # the first round warms up
    assert (slow.median, slow.low, slow.high, slow.unit) == (2.0, 1.0, 3.0, "s")
    assert (read.median, read.low, read.high, read.unit) == (20.0, 10.0, 40.0, "tokens/s")


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += measuring.MIN_SECONDS / 4
        calls.append(1)

    (result,) = measure({"short": Case(call)}, 1)
    assert len(calls) == 1 + 4
    assert result.median == pytest.approx(measuring.MIN_SECONDS / 4)


def test_peak_memory_is_that_of_the_case() -> None:
    big = measuring.MIB * 64 // 4
    small, large = measure(
        {"small": Case(lambda: mx.eval(mx.zeros(4))), "large": Case(lambda: mx.eval(mx.ones(big) + 1))}, 1
    )
    assert large.peak_mib >= small.peak_mib + 60
    assert [line.split("  ")[0] for line in table([small, large])] == ["small", "large"]


def test_a_diffusion_model_is_timed_in_each_of_its_ways(tiny_model_dir: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model_dir)
    assert [name.split()[0] for name in text_cases(loaded)] == ["read", "write"]
    assert list(picture_cases(loaded)) == [
        "a picture, 25 steps dpmpp_2m, guided", "a picture, 16 steps dpmpp_2m, guided",
        "a picture, 250 steps ddpm, guided", "8 pictures at once",
    ]  # fmt: skip
    cases = training_cases(loaded, tmp_path)
    assert list(cases) == ["training step, 16 pictures", "sCM step, 16 pictures"]
    for case in cases.values():
        case.call()  # a whole step


def test_a_student_is_timed_in_its_own_and_not_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    teacher = load(tiny_model_dir)
    objective = {"objective": {"name": "consistency"}}
    loaded = load(save_model(tmp_path / "student", teacher.model, teacher.tokenizer, objective))
    names = ["a picture, 2 steps consistency", "a picture, 1 step", "8 pictures at once"]
    assert list(picture_cases(loaded)) == names
    assert training_cases(loaded, tmp_path) == {}


def test_the_command_line(cli: Any, tiny_model_dir: Path) -> None:
    flags = ["--model", str(tiny_model_dir), "--rounds", "1", "--no-training"]
    shown = cli("bench", *flags)
    assert shown.code == 0
    assert "a picture, 25 steps dpmpp_2m, guided" in shown.out
    report = json.loads(cli("bench", *flags, "--json").out)
    (model,) = report["models"]
    assert model["parameters"] == parameter_count(load(tiny_model_dir).model)
    assert all(0 < r["low"] <= r["median"] <= r["high"] for r in model["results"])
    assert report["machine"]["mlx"]
    bad = cli("bench", "--rounds", "0")
    assert (bad.code, bad.err.strip()) == (2, "error: --rounds is 0: use at least 1")
