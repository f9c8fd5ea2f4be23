"""The tiny run of the trainer, with overrides, to its end, and after two steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import (
    MUON,
    Arrays,
    MakeConfig,
    losses_of,
    state,
    write_run,
)

from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.trainer import train


@pytest.fixture(scope="session")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture
def config(toml: Path, tmp_path: Path) -> MakeConfig:
    """`config("steps=3", output="again")`: the tiny run with overrides, in a folder of its own."""

    def make(*overrides: str, output: str = "out") -> TrainConfig:
        return load_train_config(toml, [*overrides, f"output={tmp_path / output}"])

    return make


@pytest.fixture(scope="session")
def uninterrupted(
    toml: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Arrays, list[dict]]]:
    """The end of the six steps of the tiny run (with Muon, which has the most state), and its metrics."""
    output = tmp_path_factory.mktemp("uninterrupted")
    last = train(load_train_config(toml, [*MUON, f"output={output}"]))
    return state(last), losses_of(output)


@pytest.fixture(scope="session")
def two_steps(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    train(load_train_config(toml, ["steps=2", f"output={output}"]))
    return output
