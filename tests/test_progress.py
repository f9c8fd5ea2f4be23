"""What a training run shows while it runs: lines in a pipe, a bar on a terminal, always on stderr."""

from __future__ import annotations

import pytest

from mlx_transfusion.training.progress import Progress

VALUES = {"text_loss": 2.5, "image_loss": 0.25, "tokens_per_second": 1234.0, "peak_memory_gb": 1.5}
SHOWN = "text 2.500 image 0.2500 1234 tok/s 1.5 GB"


def show() -> None:
    with Progress(4, 0, True) as progress:
        progress.advance(2, VALUES)
        progress.advance(3, VALUES)
        progress.note("saved")


def test_lines_in_a_pipe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show()
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"step 2/4 {SHOWN} ETA 0 min\nsaved\n"  # the next line comes half a minute later


def test_a_bar_on_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    show()
    out, err = capfd.readouterr()
    assert out == ""
    assert "ETA" not in err
    assert SHOWN.split()[-2] in err
    assert "3/4" in err


def test_other_processes_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(4, 0, False) as progress:
        progress.advance(4, VALUES)
        progress.note("saved")
    assert capfd.readouterr() == ("", "")
