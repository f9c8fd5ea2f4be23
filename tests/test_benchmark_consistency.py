"""The consistency benchmark: its arithmetic on made-up timings, its parts on tiny models. No speed is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_training import write_run

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.consistency_step import ConsistencyStep

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/consistency.py` finds them
benchmark, cases = (importlib.import_module(name) for name in ("consistency", "consistency_cases"))
sys.path.remove(str(BENCHMARKS))

CASES = [
    "value", "value and tangent", "diffusion step", "distillation step",
    "student, 2 steps", "teacher, 16 steps dpmpp_2m guided", "teacher, 250 steps ddpm guided",
]  # fmt: skip
OBJECTIVE = {"name": "consistency", "method": "scd", "teacher": "0" * 16, "guidance": 3.0, "angles": [1.1]}
DISTILL = """
output = "students"
tokenizer = "tokenizer.model"
batch_size = 9
sequence_length = 32

[consistency]
teacher = "teacher"

[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "texts.jsonl"
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Transfusion],
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer,
) -> Path:  # fmt: skip
    """Data, `teacher`, `student` and `distill.toml`."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_run(folder, tiny_tokenizer)
    (folder / "distill.toml").write_text(DISTILL)
    save_model(folder / "teacher", make_model(tiny_config), tiny_tokenizer)
    save_model(folder / "student", make_model(tiny_config, 1), tiny_tokenizer, {"objective": OBJECTIVE})
    return folder


@pytest.fixture(scope="module")
def prepared(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cases and facts of a quick run."""
    made: tuple[dict[str, Any], dict[str, Any]] = cases.prepare(
        str(folder / "distill.toml"), str(folder / "student"), str(folder / "students"), True
    )
    return made


@pytest.fixture
def rounds() -> list[dict[str, list[float]]]:
    """Three rounds; the machine is twice as slow in the second one."""
    seconds = [[0.1, 0.1, 9.0], [0.15], [1.0], [2.5], [0.02, 0.01], [0.09], [0.3]]
    return [
        {name: [f * value for value in values] for name, values in zip(CASES, seconds, strict=True)}
        for f in (1.0, 2.0, 1.0)
    ]


# ---- the arithmetic ----


def test_the_report(rounds: list[Any]) -> None:
    rounds[2]["value and tangent"] = [0.19]
    assert benchmark.table(rounds).splitlines()[:4] == [
        "| what | milliseconds: median (lowest to highest round) |",
        "|---|---|",
        "| value | 100.0 (100.0 to 200.0) |",
        "| value and tangent | 190.0 (150.0 to 300.0) |",
    ]
    assert benchmark.goals(rounds, verdict=True).splitlines() == [
        "| ratio | times: median (lowest to highest round) | goal | |",
        "|---|---|---|---|",
        "| value and tangent / value | 1.50 (1.50 to 1.90) | at most 2 | reached |",
        "| distillation step / diffusion step | 2.50 (2.50 to 2.50) | at most 3 | reached |",
        "| teacher, 250 steps ddpm guided / student, 2 steps | 20.00 (20.00 to 20.00) | at least 15 | reached |",
        "| teacher, 16 steps dpmpp_2m guided / student, 2 steps | 6.00 (6.00 to 6.00) | at least 5 | reached |",
    ]


def test_missed_goals_are_said(rounds: list[Any]) -> None:
    for each in rounds:
        for name in ("value and tangent", "distillation step", "student, 2 steps"):
            each[name] = [2 * value for value in each[name]]
    judged = benchmark.goals(rounds, verdict=True)
    assert judged.count("| NOT reached |") == 4
    assert benchmark.goals(rounds, verdict=False) == judged.replace("NOT reached", "not judged")


def test_cases_take_turns_and_warming_up_does_not_count() -> None:
    calls: list[str] = []
    given = {k: cases.Case(lambda k=k: calls.append(k), n, 2) for k, n in (("a", 1), ("b", 3))}
    rounds = benchmark.measure(given, 2)
    assert "".join(calls) == "aabb" + "abbb" * 2
    assert [{k: len(v) for k, v in each.items()} for each in rounds] == [{"a": 1, "b": 3}] * 2
    calls.clear()
    benchmark.measure(given, 1, quick=True)
    assert "".join(calls) == "abab"


# ---- what is timed ----


def test_what_is_measured(prepared: tuple[dict[str, Any], dict[str, Any]], folder: Path) -> None:
    made, facts = prepared
    assert list(made) == CASES
    assert {name for g in benchmark.GOALS for name in (g.slow, g.fast)} == set(CASES)
    assert facts["teacher"] == f"teacher ({load(folder / 'teacher').fingerprint})"
    assert facts["student"] == f"student ({load(folder / 'student').fingerprint})"
    assert not (folder / "students").exists()


def test_the_tangent_is_that_of_the_value(folder: Path) -> None:
    """Both cases evaluate the same network at the same states, and the second gives a derivative too."""
    made = cases.tangent_cases(load(folder / "student"), 3)
    (value,), (same, derivative) = (made[name].call() for name in CASES[:2])
    assert value.shape == derivative.shape == (3, 4, 48)
    np.testing.assert_allclose(value, same, rtol=1e-4, atol=1e-5)
    assert np.abs(np.array(derivative)).max() > 0.01


@pytest.mark.parametrize("name", CASES[2:4])
def test_a_timed_step_trains(prepared: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    made, _ = prepared
    step = made[name].call
    trainer = step.trainer
    before, at = dict(tree_flatten(trainer.state.weights)), trainer.state.step
    step()
    after = dict(tree_flatten(trainer.state.weights))
    assert trainer.state.step == at + 1
    assert [k for k in before if mx.array_equal(before[k], after[k])] == []
    assert isinstance(trainer.step, ConsistencyStep) == (name == "distillation step")
    assert trainer.config.consistency is None or trainer.teacher is not None


def test_both_steps_have_the_same_documents(prepared: tuple[dict[str, Any], dict[str, Any]]) -> None:
    made, _ = prepared
    diffusion, distillation = (made[name].call for name in CASES[2:4])
    assert diffusion.documents is distillation.documents
    pictures = sum(len(d.images) for d in diffusion.documents)
    assert len(diffusion.batch.angle) == pictures > 0
    ours = distillation.batch
    assert ours.rest is not None
    behind_prefixes = int(ours.weight.sum())
    assert 0 < behind_prefixes <= pictures <= behind_prefixes + len(ours.rest.angle)


def test_pictures_are_painted_as_the_names_say(
    prepared: tuple[dict[str, Any], dict[str, Any]], folder: Path
) -> None:
    made, _ = prepared
    settings = {name: made[name].call()[0].settings for name in CASES[4:]}
    said = {k: (s["model"], s["sampler"], s["steps"], s["guidance"]) for k, s in settings.items()}
    assert said == {
        "student, 2 steps": ("student", "consistency", 2, 1.0),
        "teacher, 16 steps dpmpp_2m guided": ("teacher", "dpmpp_2m", 16, 3.0),
        "teacher, 250 steps ddpm guided": ("teacher", "ddpm", 250, 3.0),
    }


def test_the_teacher_stands_in_for_a_student_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Path:
        raise UserError(f"{name} is missing")

    teacher = load(folder / "teacher")
    monkeypatch.setattr(cases, "resolve", missing)
    student, stands_in = cases.student_of(None, teacher)
    assert stands_in
    assert student.model is teacher.model
    assert student.extra == {"objective": {"name": "consistency"}}
    assert teacher.extra == {}
    made = cases.picture_cases(student, teacher)
    assert made["student, 2 steps"].call()[0].settings["steps"] == 2
    assert cases.student_of(str(folder / "student"), teacher)[0].extra == {"objective": OBJECTIVE}


# ---- a whole run ----


@pytest.mark.parametrize("load_before", [0.1, 3.0])
def test_a_whole_run(
    rounds: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_before: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The file has the timings, and a busy machine gets no verdict."""
    monkeypatch.setattr(benchmark, "prepare", lambda *_: ({}, {"student": "made up"}))
    monkeypatch.setattr(benchmark, "measure", lambda *_: rounds)
    monkeypatch.setattr(benchmark.os, "getloadavg", lambda: (load_before, 0.0, 0.0))
    assert benchmark.main(["--output", str(tmp_path / "results.json")]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rounds"] == rounds
    assert written["facts"]["student"] == "made up"
    assert written["ratios"]["distillation step / diffusion step"] == {"middle": 2.5, "low": 2.5, "high": 2.5}
    printed = capsys.readouterr()
    assert benchmark.table(rounds) in printed.out
    assert benchmark.goals(rounds, verdict=load_before < 1) in printed.out


def test_a_quick_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--config", str(folder / "distill.toml"), "--student", str(folder / "student")]
    assert benchmark.main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("not judged") == len(benchmark.GOALS)
    assert all(f"\n| {name} | " in out for name in CASES)


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--rounds", "0"], ["--rounds", "many"]):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(flags)
    capsys.readouterr()
    good = ["--config", str(folder / "distill.toml")]
    for flags, message in (
        (["--config", "nowhere.toml"], "cannot read the training config"),
        (["--config", str(folder / "train.toml")], "has no teacher in a [consistency] table"),
        ([*good, "--student", str(folder / "teacher")], "is a diffusion model"),
    ):
        assert benchmark.main([*flags, "--quick"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
