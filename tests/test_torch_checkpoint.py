"""Checkpoints of the PyTorch path on one process: exact resuming, damaged files, other runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

import torch.distributed.checkpoint as dcp  # noqa: E402
from tiny_training import write_run  # noqa: E402

from mlx_transfusion import model_io  # noqa: E402
from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch import checkpoint as ckpt  # noqa: E402
from mlx_transfusion.torch.export import export  # noqa: E402
from mlx_transfusion.torch.folder import load, read_weights  # noqa: E402
from mlx_transfusion.torch.machines import Machines  # noqa: E402
from mlx_transfusion.torch.parallel import processes  # noqa: E402
from mlx_transfusion.torch.trainer import train  # noqa: E402
from mlx_transfusion.training.config import load_train_config  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def world() -> Any:
    """One process group for all tests of this file."""
    with processes() as one:
        yield one


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("torch"), tiny_tokenizer)


@pytest.fixture(scope="module")
def finished(toml: Path, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run with checkpoints at steps 4 and 6; tests copy it."""
    output = tmp_path_factory.mktemp("finished")
    run(toml, world, output)
    return output


def run(toml: Path, world: Any, output: Path, *changes: str, resume: bool = True, **machines: Any) -> Path:
    return train(load_train_config(toml, [f"output={output}", *changes]), Machines(**machines), world, resume)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("background", [False, True])
def test_resumed_exactly(background: bool, toml: Path, world: Any, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "torch/step-00000006")  # as if it had been killed after step 4
    last = run(toml, world, output, "save_every=1", background_save=background)
    assert losses(output) == losses(finished)
    for which in ("average", "weights"):
        a, b = (
            dict(read_weights(export(path, tmp_path / which / name, which)))
            for name, path in (("a", finished / "torch/step-00000006"), ("b", last))
        )
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(p.name for p in (output / "torch").iterdir()) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("which", ["average", "weights"])
def test_to_mlx_and_back_bit_for_bit(which: str, finished: Path, tmp_path: Path) -> None:
    """A distributed checkpoint -> MLX loads it and saves it -> PyTorch reads that: weights or average, and config."""
    checkpoint = finished / "torch/step-00000006"
    ours = model_io.load(export(checkpoint, tmp_path / "exported", which))
    back, extra = load(model_io.save_model(tmp_path / "mlx", ours.model, ours.tokenizer, ours.extra))
    stored = {name: torch.empty_like(p) for name, p in back.named_parameters()}
    dcp.load({which: stored}, checkpoint_id=checkpoint)
    for name, p in back.named_parameters():
        assert torch.equal(p, stored[name]), name
    record = ckpt.read_record(checkpoint)["config"]
    assert back.config == ours.config == ModelConfig.from_dict(record["model_config"], "record")
    assert extra == record["extra"]


def test_average_and_weights_differ(finished: Path, tmp_path: Path) -> None:
    a, b = (
        dict(read_weights(export(finished / "torch/step-00000006", tmp_path / which, which)))
        for which in ("average", "weights")
    )
    assert any(not torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("damage", ["bits", "cut", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "torch", tmp_path / "torch")
    newest = tmp_path / "torch/step-00000006"
    file = next(newest.glob("*.distcp"))
    data = file.read_bytes()
    if damage == "bits":
        file.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "state.json").write_text("{")
    found = ckpt.newest_good(tmp_path / "torch")
    assert found is not None
    assert found[0].name == "step-00000004"
    assert "damaged" in capfd.readouterr().err


def test_no_whole_checkpoint_is_an_error(toml: Path, world: Any, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in ckpt.checkpoints(tmp_path / "torch"):
        (path / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        run(toml, world, tmp_path)
    with pytest.raises(UserError, match=r"damaged \(.metadata has 0 bytes"):
        export(path, tmp_path / "out")


def test_another_run_is_refused(toml: Path, world: Any, finished: Path) -> None:
    with pytest.raises(
        UserError, match=r"was trained with optimizer.learning_rate = 0.003, the config says 0.1"
    ):
        run(toml, world, finished, "optimizer.learning_rate=0.1")
    with pytest.raises(UserError, match="holds checkpoints already"):
        run(toml, world, finished, resume=False)


def test_a_full_disk_leaves_the_last_checkpoint(
    toml: Path, world: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "torch/step-00000006")

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    with pytest.raises(UserError, match=r"cannot save the checkpoint .*No space left"):
        run(toml, world, tmp_path)
    found = ckpt.newest_good(tmp_path / "torch")
    assert found is not None
    assert found[0].name == "step-00000004"
