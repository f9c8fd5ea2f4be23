"""The benchmark's arithmetic and report on made-up timings, and our worker on a tiny model. No speed is asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY: dict[str, Any] = {
    "width": 32, "layers": 2, "heads": 2, "feed_forward": 85, "vocabulary": 200, "image_size": 8, "patch_size": 4,
    "text_tokens": 5, "batch": 3, "steps": 3, "warm_up": 1, "repeats": 2,
}  # fmt: skip
OURS, WIDE, THEIRS = "mlx-transfusion", "mlx-transfusion, wide", "transfusion-pytorch"

sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/compare.py` finds them
compare, ours, report, theirs, workload = (
    importlib.import_module(name) for name in ("compare", "ours", "report", "theirs", "workload")
)
sys.path.remove(str(BENCHMARKS))


def result(parameters: int, **seconds: list[float]) -> dict[str, Any]:
    """As a worker prints it."""
    names = {"step": "training step", "picture": "guided picture"}
    names |= {"sample": "guided picture, sample", "many": "guided picture, sample_many"}
    return {
        "parameters": parameters,
        "seconds": {names[key]: value for key, value in seconds.items()},
        "versions": {"made": "up"},
        "positions": [16, 92],
        "passes": {},
    }


@pytest.fixture
def rounds() -> list[dict[str, dict[str, Any]]]:
    """Three rounds; the machine is twice as slow in the second one."""
    return [
        {
            OURS: result(1_000, step=[9.0 * f, 1.0 * f, 0.5 * f], picture=[2.0 * f]),
            THEIRS: result(3_000, step=[g * f], sample=[20.0 * f], many=[10.0 * f]),
            WIDE: result(2_999, step=[2.0 * f], picture=[4.0 * f]),
        }
        for f, g in ((1.0, 3.0), (2.0, 4.0), (1.0, 2.5))
    ]


def test_a_round_counts_the_median_of_its_calls(rounds: list[Any]) -> None:
    assert report.seconds(rounds, OURS, "training step") == [1.0, 2.0, 1.0]


def test_ratios_are_taken_within_a_round_and_to_the_faster_way(rounds: list[Any]) -> None:
    found = report.ratios(rounds)
    assert found == {
        "training step": {OURS: report.Summary(3.0, 2.5, 4.0), WIDE: report.Summary(1.5, 1.25, 2.0)},
        "guided picture": {OURS: report.Summary(5.0, 5.0, 5.0), WIDE: report.Summary(2.5, 2.5, 2.5)},
    }


TIMES = st.floats(1e-3, 1e3)


@given(
    pairs=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=9),
    slow=st.lists(TIMES, min_size=9, max_size=9),
)
def test_a_machine_that_slows_down_between_rounds_changes_no_ratio(
    pairs: list[Any], slow: list[float]
) -> None:
    theirs, ours = zip(*pairs, strict=True)
    plain = report.ratio(theirs, ours)
    weather = slow[: len(pairs)]
    slowed = report.ratio(
        [t * f for t, f in zip(theirs, weather, strict=True)],
        [t * f for t, f in zip(ours, weather, strict=True)],
    )
    assert [slowed.low, slowed.middle, slowed.high] == pytest.approx([plain.low, plain.middle, plain.high])
    assert plain.low <= plain.middle <= plain.high
    assert plain.middle * report.ratio(ours, theirs).middle == pytest.approx(1) or len(pairs) % 2 == 0


def test_the_report(rounds: list[Any]) -> None:
    assert report.table(rounds).splitlines() == [
        "| measurement | peer | parameters | seconds: median (lowest to highest round) | times as fast |",
        "|---|---|---|---|---|",
        "| training step | mlx-transfusion | 1,000 | 1.000 (1.000 to 2.000) | 3.00x (2.50 to 4.00) |",
        "| training step | transfusion-pytorch | 3,000 | 3.000 (2.500 to 8.000) | 1 (the peer's fastest way) |",
        "| training step | mlx-transfusion, wide | 2,999 | 2.000 (2.000 to 4.000) | 1.50x (1.25 to 2.00) |",
        "| guided picture | mlx-transfusion | 1,000 | 2.000 (2.000 to 4.000) | 5.00x (5.00 to 5.00) |",
        "| guided picture, sample | transfusion-pytorch | 3,000 | 20.000 (20.000 to 40.000) |  |",
        "| guided picture, sample_many | transfusion-pytorch | 3,000 | 10.000 (10.000 to 20.000) "
        "| 1 (the peer's fastest way) |",
        "| guided picture | mlx-transfusion, wide | 2,999 | 4.000 (4.000 to 8.000) | 2.50x (2.50 to 2.50) |",
    ]


@pytest.mark.parametrize("load", [0.1, 3.0])
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Peers take turns, the page and the file have the numbers, and a busy machine gets no verdict."""
    started: list[tuple[str, str]] = []

    def run(command: list[str], threads: int) -> dict[str, Any]:
        assert threads == 3
        started.append((command[0], Path(command[1]).name))
        mine = result(1_000, step=[1.0], picture=[2.0]) | {
            "flops": {"training step": 2e10, "guided picture": 1e10}
        }
        others = {
            "ours.py": mine,
            "theirs.py": result(3_000, step=[5.0], sample=[20.0], many=[10.0]),
            "torch_path.py": result(1_000, step=[0.5]),
            "parts.py": {"values": {"numpy": [50.0], "MLX": [40.0, 40.0, 30.0]}},
        }
        return others[Path(command[1]).name]

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (load, 0.0, 0.0))
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    flags = [
        "--rounds",
        "2",
        "--threads",
        "3",
        "--output",
        str(file),
        "--document",
        str(page),
        "--peer-python",
        "other",
    ]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--only", "transfusion", "matmul", "text"])
    assert compare.main() == 0
    here = sys.executable
    turn = [
        (here, "ours.py"),
        ("other", "theirs.py"),
        (here, "ours.py"),
        *2 * [(here, "torch_path.py")],
        (here, "parts.py"),
    ]
    assert started == 2 * turn
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == 3
    assert written["ratios"]["guided picture"][OURS] == {"middle": 5.0, "low": 5.0, "high": 5.0}
    text = page.read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    step = lines["training step, times as fast as transfusion-pytorch"]
    assert "| 5.00x (5.00 to 5.00) | at least 4x |" in step
    assert "80%" in lines["fp32 matrix product through MLX, of numpy's rate"]
    assert "50%" in lines["training step, of the matmul-rate limit"]
    assert "not measured" in lines["8 pictures at once beside one by one"]
    assert "- text: text decode needs --gguf" in text
    missed = lines["training step, times as fast as our PyTorch path"]
    if load < 1:
        assert step.endswith("| reached |")
        assert missed.endswith("| **missed** |")
    else:
        assert step.endswith("| not judged |")
        assert compare.NO_VERDICT in text
        assert compare.NO_VERDICT in capsys.readouterr().err


def test_text_is_told_by_text_decode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ratio of the best turns, and its gain of eight texts at once."""
    printed = {
        kind: {"measures": {"decode": {"ratio": ratio}, "load": {"ratio": 1.5}}, "batch gain": 3.5}
        for kind, ratio in (("float32", 1.25), ("4 bits", 0.5))
    }
    monkeypatch.setattr(compare, "run", lambda command, threads: printed)
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    page = tmp_path / "page.md"
    flags = ["--rounds", "1", "--document", str(page), "--gguf", "x.gguf", "--only", "text"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    assert compare.main() == 0
    text = page.read_text()
    assert "| text decode beside mlx-lm, float32 | 1.25x (1.25 to 1.25) | at least 1x | reached |" in text
    assert "| text decode beside mlx-lm, 4 bits | 0.50x (0.50 to 0.50) | at least 1x | **missed** |" in text
    assert (
        "| loading a language model, times as fast as mlx-lm, 4 bits | 1.50x (1.50 to 1.50) | none | no goal"
        in text
    )
    assert "| text, batch of 8 beside one, 4 bits | 3.50x (3.50 to 3.50) | at least 3x | reached |" in text


def test_a_worker_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    page = tmp_path / "page.md"
    flags = [
        "--rounds",
        "1",
        "--document",
        str(page),
        "--peer-python",
        "no-such-python",
        "--only",
        "diffusers",
    ]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    assert compare.main() == 0
    assert "- diffusers: cannot start no-such-python: No such file" in page.read_text()
    assert "| AutoencoderKL | decode 4 pictures |" in page.read_text()


def test_a_worker_that_fails_ends_the_run_with_its_complaint() -> None:
    with pytest.raises(SystemExit, match="error: no torch here"):
        compare.run([sys.executable, "-c", "import sys; sys.exit('error: no torch here')"], 1)
    with pytest.raises(SystemExit, match="error: cannot start no-such-python: No such file"):
        compare.run(["no-such-python", "x.py"], 1)


def test_every_worker_gets_the_same_number_of_threads() -> None:
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if 'THREADS' in k}))"
    seen = compare.run([sys.executable, "-c", code], 3)
    assert {seen[name] for name in compare.THREAD_VARIABLES} == {"3"}


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_bad_flags(rounds: str) -> None:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--rounds", rounds]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_workloads_travel_as_json() -> None:
    for each in compare.OURS.values():
        assert workload.Workload.from_json(each.to_json()) == each
    assert (compare.BASE.image_tokens, compare.BASE.patch_dim, compare.BASE.positions) == (64, 48, 92)


# ---- the workers ----


def test_our_worker_on_a_tiny_model() -> None:
    tiny = workload.Workload(**TINY)
    printed = compare.run([sys.executable, str(BENCHMARKS / "ours.py"), tiny.to_json()], 1)
    assert {name: len(values) for name, values in printed["seconds"].items()} == {
        "training step": 2,
        "guided picture": 2,
    }
    assert all(value > 0 for values in printed["seconds"].values() for value in values)
    assert printed["positions"] == [3, 13]
    assert printed["passes"] == {"guided picture": 14}


def test_our_worker_trains() -> None:
    """A step that is timed does change the weights, and what it optimises gets better."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_transfusion.models.transfusion import Transfusion
    from mlx_transfusion.training.step import evaluate_batch

    tiny = workload.Workload(**TINY)
    mx.random.seed(0)
    model = Transfusion(ours.model_config(tiny))
    mx.eval(model.parameters())
    trainer = ours.Training(model, tiny)
    fixed, before = trainer.batch(), dict(tree_flatten(model.parameters()))
    text, _, image, _ = evaluate_batch(model, fixed)
    for _ in range(20):
        trainer.step()
    after = dict(tree_flatten(model.parameters()))
    unchanged = [name for name in before if mx.array_equal(before[name], after[name])]
    assert unchanged == []
    assert evaluate_batch(model, fixed)[0] < text
    assert evaluate_batch(model, fixed)[2] < image
    assert ours.picture(model, tiny).shape == (8, 8, 3)


def test_the_peer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "version", lambda _: "0.19.4")
    with pytest.raises(SystemExit, match=r"has transfusion-pytorch 0\.19\.4, expected 0\.20\.0: pip install"):
        theirs.check_version()


def test_their_worker_on_a_tiny_model() -> None:
    pytest.importorskip("transfusion_pytorch", reason="the peer is no dependency: it is not installed here")
    tiny = workload.Workload(**TINY)
    printed = theirs.measure(tiny, 1)
    # The last position is a target only; their picture has one step less, and reads one or two prompts.
    assert printed["positions"] == [3, 12]
    assert printed["passes"] == {"guided picture, sample": 9, "guided picture, sample_many": 10}
    assert {name: len(values) for name, values in printed["seconds"].items()} == {
        "training step": 2,
        "guided picture, sample": 2,
        "guided picture, sample_many": 2,
    }
