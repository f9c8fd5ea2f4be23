"""The loader of the PyTorch path: threads and processes give the same steps, and faults are told in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402

from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch.loader import Loaded, Loader  # noqa: E402
from mlx_transfusion.torch.start import model_shape  # noqa: E402
from mlx_transfusion.training.config import load_train_config  # noqa: E402
from mlx_transfusion.training.data import DataSet  # noqa: E402


class Packs:
    """The part of a training step that a loader needs."""

    def count(self, data: DataSet, document: Any) -> tuple[int, int]:
        return data.count(document)

    def load(self, data: DataSet, documents: Any) -> Any:
        return data.batch(documents)

    def flops(self, batch: Any) -> float:
        return 0.0


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("loader"), tiny_tokenizer)


def make_loader(toml: Path, rank: int = 0, size: int = 1, *changes: str) -> Loader:
    config = load_train_config(toml, list(changes))
    tokenizer = Tokenizer.load(config.tokenizer)
    data = DataSet(
        config.data.train, config.data, config.diffusion, model_shape(config, tokenizer), tokenizer,
        seed=config.seed, sequence_length=config.sequence_length,
    )  # fmt: skip
    step: Any = Packs()
    return Loader(data, step, config, rank, size)


def assert_same(a: Loaded, b: Loaded) -> None:
    assert (a.text_total, a.image_total, a.tokens) == (b.text_total, b.image_total, b.tokens)
    for one, other in zip(a.parts, b.parts, strict=True):
        np.testing.assert_array_equal(one.packed.ids, other.packed.ids)
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.noise, other.noise)


def test_processes_read_what_a_thread_reads(toml: Path) -> None:
    loader = make_loader(toml, 1, 2, "accumulate=2")
    thread, two = list(loader.steps(2)), list(loader.steps(2, workers=2))
    assert len(thread) == len(two) == 4
    for n, (a, b) in enumerate(zip(thread, two, strict=True), start=2):
        assert_same(a, loader.load(n))
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_told_in_one_line(workers: int, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(toml)

    def broken(self: DataSet, documents: Any) -> Any:
        raise UserError("pictures.tar: cut off inside red.png")

    monkeypatch.setattr(DataSet, "batch", broken)
    with pytest.raises(UserError, match=r"^pictures\.tar: cut off inside red\.png$"):
        list(loader.steps(0, workers))


def test_a_reader_that_is_killed(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(toml)
    batch, parent = DataSet.batch, os.getpid()

    def killed(self: DataSet, documents: Any) -> Any:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, documents)

    monkeypatch.setattr(DataSet, "batch", killed)
    with pytest.raises(
        UserError, match=r"a process that reads data is gone .*go on from the last checkpoint"
    ):
        list(loader.steps(0, workers=1))
