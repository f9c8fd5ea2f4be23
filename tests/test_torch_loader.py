"""The loader of the PyTorch path: threads and processes give the same steps, and faults are told in one line."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from shard_tools import build_both, write_inputs  # noqa: E402
from tiny_training import write_run  # noqa: E402

from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch.loader import Loaded, Loader  # noqa: E402
from mlx_transfusion.torch.start import model_shape  # noqa: E402
from mlx_transfusion.training.config import TrainConfig, load_train_config  # noqa: E402
from mlx_transfusion.training.data import DataSet  # noqa: E402
from mlx_transfusion.training.shard_set import ShardSet, open_data  # noqa: E402


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


class Names(Packs):
    """Packs nothing: the share of a process is the list of its sequences."""

    def load(self, data: Any, documents: Any) -> Any:
        return Share(documents)


class Share(list[Any]):
    tokens = 0


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer
) -> tuple[TrainConfig, ShardSet]:
    path = write_inputs(tmp_path_factory.mktemp("shares"), tiny_tokenizer)
    build_both(path)
    config = load_train_config(path, ["steps=30", "batch_size=12"])
    data = open_data(
        config.data.train, config.data, config.diffusion, model_shape(config, tiny_tokenizer), tiny_tokenizer,
        seed=3, sequence_length=config.sequence_length,
    )  # fmt: skip
    assert isinstance(data, ShardSet)
    return config, data


LIVES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=5)
"""Of each time a run was started: processes, parts of a step, and steps until it was killed."""


@given(lives=LIVES, save_every=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_no_sequence_is_repeated_or_left_out(
    shards: tuple[TrainConfig, ShardSet], lives: list[tuple[int, int, int]], save_every: int
) -> None:
    """Whatever processes train, and wherever they are killed: what counts for the weights is one straight run."""
    config, data = shards
    trained: dict[int, list[Any]] = {}  # by step, what the weights have seen of it
    start = 0
    for processes, accumulate, steps in lives:
        changed = dataclasses.replace(config, accumulate=accumulate)
        step: Any = Names()
        loaders = [Loader(data, step, changed, rank, processes).steps(start) for rank in range(processes)]
        end = min(start + steps, config.steps)
        for n in range(start, end):
            shares = [next(loader) for loader in loaders]
            trained[n] = [d for share in shares for part in share.parts for d in part]
            assert len({(s.text_total, s.image_total) for s in shares}) == 1
        start = end // save_every * save_every  # where its last checkpoint stands
        trained = {n: seen for n, seen in trained.items() if n < start}
    assert list(trained) == list(range(start))
    for n, seen in trained.items():
        assert sorted(d.number for d in seen) == list(
            range(n * config.batch_size, (n + 1) * config.batch_size)
        )
        assert {d.number: d for d in seen} == {
            d.number: d for d in data.documents(n, config.batch_size, n / 29)
        }
    for s, folder in enumerate(data.folders):
        seen = [d for n in trained for d in sorted(trained[n], key=lambda d: d.number) if d.source == s]
        for first in range(0, len(seen) - len(folder) + 1, len(folder)):
            epoch = seen[first : first + len(folder)]
            assert sorted(d.place for d in epoch) == list(range(len(folder)))
