"""The model in the package does what the README says, measured on a few captions of its own data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_transfusion.evaluation.config import Counts, load_config
from mlx_transfusion.evaluation.report import measure
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.model_path import resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundled() -> Loaded:
    return load("emoji")


@pytest.fixture(scope="module")
def report(bundled: Loaded) -> dict[str, Any]:
    config = load_config(ROOT / "examples" / "emoji" / "evaluate.toml", ROOT / "examples" / "emoji" / "data")
    counts = Counts(pictures=24, descriptions=24, losses=24, texts=60, baseline_texts=5000)
    return measure(bundled, replace(config, counts=counts), True, lambda what, done, total: None)


def test_it_fits_the_package(bundled: Loaded) -> None:
    folder = resolve("emoji")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000


def test_it_paints_what_captions_say(report: dict[str, Any]) -> None:
    # The full evaluation finds more than half; 24 pictures scatter around that by a tenth.
    assert report["pictures"]["train"]["variant"]["rate"] >= 0.4


def test_it_describes_pictures(report: dict[str, Any]) -> None:
    descriptions = report["descriptions"]["train"]
    # 64% of 200 with their very own caption, 78% counting variants.
    assert descriptions["right"]["rate"] >= 0.4
    assert descriptions["variant"]["rate"] >= 0.55


def test_captions_guide_it_at_full_noise(report: dict[str, Any]) -> None:
    error = report["losses"]["train"]["denoising"]
    with_caption, without = (error[k]["picture_error_at_noise"] for k in ("with_caption", "without_caption"))
    assert with_caption < 0.6 * without


def test_it_has_learned_more_than_words_by_frequency(report: dict[str, Any]) -> None:
    text = report["text"]
    assert text["model"]["perplexity"] < 0.5 * text["unigram"]["perplexity"]
