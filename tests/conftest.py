"""Shared fixtures: a random model and tokenizer small enough for any test."""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import dataclasses
import io
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten

from mlx_transfusion.cli import main
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.model_io import flat_parameters, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer, train_sentencepiece

if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    # A shell starts background jobs deaf to Ctrl-C, and every process that a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = ["red", "green", "blue", "heart", "star", "moon", "cat", "dog", "face", "hand", "happy", "sad", "big"]


def random_model(config: ModelConfig, seed: int = 0, scale: float = 0.2) -> Transfusion:
    """A model whose every weight matters (a fresh one paints nothing: its patch decoder is zero)."""
    model = Transfusion(config)
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    weights = [
        (
            name,
            value
            if value.ndim == 1 and "norm" in name
            else scale * mx.random.normal(value.shape, key=next(keys)),
        )
        for name, value in flat_parameters(model).items()
    ]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transfusion]:
    """`make_model(config, seed=0, scale=0.2)`: a random model."""
    return random_model


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece tokenizer of 288 tokens over a few words."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:4]]
    train_sentencepiece(texts, file, 288)
    return Tokenizer.load(file)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Tokenizer) -> ModelConfig:
    """Width 32, two layers, four patches of 4x4 pixels."""
    return ModelConfig(
        vocab_size=tiny_tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, image_height=8, image_width=8, patch_size=4, image_std=0.7, max_position=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig) -> Transfusion:
    """A random model of `tiny_config`; tests do not change it."""
    return random_model(tiny_config)


@pytest.fixture(scope="session", params=["plain", "grouped"])
def any_model(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> Transfusion:
    """The plain model, and one with grouped queries, QK norm, ReGLU, patch places and the paper's eps."""
    if request.param == "plain":
        return random_model(tiny_config)
    config = dataclasses.replace(
        tiny_config, num_key_value_heads=2, qk_norm=True, hidden_act="relu", patch_positions="learned",
        prediction="epsilon",
    )  # fmt: skip
    return random_model(config, seed=1)


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> Path:
    """A folder with `tiny_model` and `tiny_tokenizer`, as `load` reads it; tests do not write into it."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_model, tiny_tokenizer)


class CliResult(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CliResult]:
    """`cli("generate", "red heart", ..., stdin="")`: run the command line inside this process."""

    def run(*arguments: object, stdin: str = "") -> CliResult:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert isinstance(exit_.value.code, int)
        return CliResult(exit_.value.code, *capfd.readouterr())

    return run
