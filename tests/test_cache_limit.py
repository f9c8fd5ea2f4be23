"""How much freed memory MLX keeps: the flag of the long verbs, and the key of their TOML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_training import TOML, write_run

from mlx_transfusion.cache_limit import limit_cache
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits in bytes that MLX was given, in their order."""
    given: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: given.append(limit) or 0)
    return given


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("limit"), tiny_tokenizer).parent


def test_gigabytes(limits: list[int]) -> None:
    for value in (None, 0, 0.5, float("inf")):
        limit_cache(value)
    assert limits == [0, 500_000_000, 1 << 62]
    for bad in (-1, float("nan")):
        with pytest.raises(UserError, match="expected 0 or more"):
            limit_cache(bad)


def test_mlx_takes_it() -> None:
    before = mx.set_cache_limit(0)
    try:
        limit_cache(float("inf"))
        limit_cache(1.5)
    finally:
        mx.set_cache_limit(before)


def test_painting(limits: list[int], tiny_model_dir: Path, tmp_path: Path, cli: Any) -> None:
    flags = ["red heart", "-m", tiny_model_dir, "--steps", 1, "--seed", 1, "-o", tmp_path / "a.png"]
    assert cli("generate", *flags, "--cache-limit", 2).code == 0
    assert limits == [2_000_000_000]
    refused = cli("generate", *flags, "--cache-limit", -1)
    assert (refused.code, refused.err) == (2, "error: --cache-limit is -1 GB, expected 0 or more\n")
    assert cli("edit", tmp_path / "a.png", "blue", "-m", tiny_model_dir, "--cache-limit", -1).code == 2


def test_training(limits: list[int], folder: Path, tmp_path: Path, cli: Any) -> None:
    """The flag stands over the key of the TOML."""
    toml = folder / "limited.toml"
    toml.write_text("cache_limit = 3\n" + TOML)
    flags = [toml, "--set", "steps=1", "--set", f"output={tmp_path / 'out'}"]
    assert cli("train", *flags).code == 0
    assert cli("train", *flags, "--cache-limit", 0.25).code == 0
    assert limits == [3_000_000_000, 250_000_000]
    refused = cli("train", *flags, "--cache-limit", -2)
    assert refused.code == 2
    assert re.search(r"cache_limit is -2(\.0)?, expected 0 or more", refused.err)
    assert load_train_config(folder / "train.toml").cache_limit is None


def test_fine_tuning(limits: list[int], folder: Path, tiny_model_dir: Path, tmp_path: Path, cli: Any) -> None:
    for file in (folder / "pictures").glob("*.png"):
        file.with_suffix(".txt").write_text("red heart")
    flags = ["--model", tiny_model_dir, "--data", folder / "pictures", "-o", tmp_path / "out", "--iters", 1]
    assert cli("finetune", *flags, "--cache-limit", 1).code == 0
    assert limits == [1_000_000_000]
    refused = cli("finetune", *flags, "--cache-limit", -1)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
