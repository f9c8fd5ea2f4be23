"""The comparison of two commits: ratios, the threshold, bad input. No speed is asserted."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))
regress = importlib.import_module("regress")
sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("slowdown", "code"), [(1.0, 0), (1.1, 0), (1.3, 1)])
def test_it_fails_above_the_threshold(
    slowdown: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that is twice as slow in one round changes nothing; neither does a case that only one side has."""
    rounds = iter([1.0, 2.0, 1.0])

    def one_round(trees: dict[str, Path], number: int, threads: int) -> dict[str, dict[str, float]]:
        weather = next(rounds)
        return {
            "old": {"step": weather, "picture": 3 * weather, "gone": 1.0},
            "new": {"step": weather * slowdown, "picture": 2 * weather, "fresh": 1.0},
        }

    monkeypatch.setattr(regress, "one_round", one_round)
    monkeypatch.setattr(regress, "check_out", lambda commit, folder: regress.TREE)
    assert regress.main(["HEAD", "--rounds", "3"]) == code
    printed = capsys.readouterr().out
    assert (
        f"| step | {slowdown:.2f} ({slowdown:.2f} to {slowdown:.2f}) | {'slower' if code else 'passes'} |"
        in printed
    )
    assert "| picture | 0.67 (0.67 to 0.67) | passes |" in printed
    assert "gone" not in printed


def test_sides_take_turns_at_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Done:
        returncode, stdout, stderr = 0, '{"step": [3.0, 1.0, 2.0]}\n', ""

    def run(command: list[str], env: dict[str, str], **_: Any) -> Done:
        seen.append(command[-1])
        assert env["PYTHONPATH"].startswith(command[-1])
        assert env["OPENBLAS_NUM_THREADS"] == "2"
        return Done()

    monkeypatch.setattr(regress.subprocess, "run", run)
    trees = {"old": Path("/a"), "new": Path("/b")}
    assert regress.one_round(trees, 0, 2) == {"old": {"step": 2.0}, "new": {"step": 2.0}}
    regress.one_round(trees, 1, 2)
    assert seen == ["/a", "/b", "/b", "/a"]


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: git worktree add: .*no-such-commit"):
        regress.main(["no-such-commit"])
    with pytest.raises(SystemExit):
        regress.main(["HEAD", "--rounds", "0"])
    assert "use 1 or more" in capsys.readouterr().err
