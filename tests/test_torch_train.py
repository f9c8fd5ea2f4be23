"""Training by PyTorch on one process: the numbers of the MLX trainer, resuming, damaged files, steps left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402

from mlx_transfusion import model_io  # noqa: E402
from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.flops import step_flops, work_of  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch import checkpoint as ckpt  # noqa: E402
from mlx_transfusion.torch.batch import to_example  # noqa: E402
from mlx_transfusion.torch.export import export  # noqa: E402
from mlx_transfusion.torch.guard import WINDOW, Guard  # noqa: E402
from mlx_transfusion.torch.loader import Loader  # noqa: E402
from mlx_transfusion.torch.machines import Machines, peak_of_name  # noqa: E402
from mlx_transfusion.torch.parallel import processes  # noqa: E402
from mlx_transfusion.torch.step import Step  # noqa: E402
from mlx_transfusion.torch.trainer import Trainer, train  # noqa: E402
from mlx_transfusion.training.config import load_train_config  # noqa: E402
from mlx_transfusion.training.step import to_arrays  # noqa: E402
from mlx_transfusion.training.trainer import Trainer as MLXTrainer  # noqa: E402
from mlx_transfusion.training.trainer import train as train_with_mlx  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("torch"), tiny_tokenizer)


@pytest.fixture(scope="module", autouse=True)
def world() -> Any:
    """One process group for all tests of this file."""
    with processes() as one:
        yield one


def run(toml: Path, world: Any, output: Path, *changes: str, **machines: Any) -> Path:
    config = load_train_config(toml, [f"output={output}", *changes])
    return train(config, Machines(**machines), world)


def metrics(output: Path) -> list[dict[str, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    varies = ("tokens_per_second", "mfu")
    return [{k: v for k, v in json.loads(s).items() if k not in varies} for s in lines]


def trained(checkpoint: Path, target: Path, which: str = "average") -> dict[str, np.ndarray]:
    from mlx_transfusion.torch.folder import read_weights

    return {name: value.numpy() for name, value in read_weights(export(checkpoint, target, which))}


@pytest.mark.parametrize("variant", ["linear", "unet"])
def test_ten_steps_are_those_of_mlx(
    variant: str,
    toml: Path,
    world: Any,
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    make_model: Callable[..., Any],
) -> None:
    """Rows, orders, noise, angles, losses, clipping, AdamW, schedule, EMA, validation: from the same weights."""
    more = (
        ["model.patch_encoder=unet", "model.unet_channels=4", "model.unet_blocks=1"]
        if variant == "unet"
        else []
    )
    from mlx_transfusion.torch.start import model_shape

    start_toml = load_train_config(toml, more)
    config = model_shape(start_toml, tiny_tokenizer)
    start = model_io.save_model(tmp_path / "start", make_model(config, scale=0.1), tiny_tokenizer)
    valid = f'data.valid=[{{rows="{toml.parent}/pairs.jsonl", images="{toml.parent}/pictures"}}]'
    steps = 10 if variant == "linear" else 3
    shared = [
        *more,
        f"init={start}",
        f"steps={steps}",
        "accumulate=2",
        f"valid_every={steps}",
        "valid_batches=2",
        valid,
    ]
    ours = train_with_mlx(load_train_config(toml, [f"output={tmp_path / 'mlx'}", "compile=false", *shared]))
    theirs = run(toml, world, tmp_path / "torch", *shared)
    for a, b in zip(metrics(tmp_path / "mlx"), metrics(tmp_path / "torch"), strict=True):
        for name in a.keys() - {"peak_memory_gb", "data_wait"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    first = {k: np.array(v) for k, v in model_io.read_weights(start).items()}
    wanted = {k: np.array(v) for k, v in model_io.read_weights(ours).items()}
    for name, value in trained(theirs, tmp_path / "out").items():
        moved = np.linalg.norm(wanted[name] - first[name])
        assert moved > 0, name
        assert np.linalg.norm(value - wanted[name]) < 1e-4 * max(moved, np.linalg.norm(first[name])), name


def test_the_same_seed_gives_the_same_noise_and_angles(toml: Path, world: Any, tmp_path: Path) -> None:
    """What both sides learn from at a step, bit for bit: rows, order, pictures, noise, angles."""
    config = load_train_config(toml, [f"output={tmp_path}", "accumulate=2", "compile=false"])
    ours = MLXTrainer(config)
    theirs = Trainer(config, Machines(), world)
    loader = Loader(theirs.train_data, theirs.step, config, 0, 1)
    for step in (0, 5):
        for a, b in zip(ours._load(step).parts, loader.load(step).parts, strict=True):
            for name in ("pixels", "noise", "angle"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            for x, y in zip(vars(a.packed).values(), vars(b.packed).values(), strict=True):
                np.testing.assert_array_equal(x, y)
            arrays, target, _, _ = to_arrays(a, ours.model)
            example = to_example(b, theirs.model.config, torch.device("cpu"))
            np.testing.assert_allclose(example.arrays.patches, arrays.patches, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(example.target, target[0], rtol=1e-6, atol=1e-6)


class Poisoned(Step):
    """Gradients that are not finite at some steps."""

    bad: range

    def backward(self, batch: Any, text_total: int, image_total: int, step: int) -> Any:
        sums = super().backward(batch, text_total, image_total, step)
        if step in self.bad:
            next(self.model.parameters()).grad.mul_(float("nan"))
        return sums


def test_steps_that_are_not_finite_are_left_out(
    toml: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_transfusion.torch.trainer.Step", Poisoned)
    Poisoned.bad = range(2, 4)
    last = run(toml, world, tmp_path / "a")
    record = ckpt.read_record(last)
    assert (record["step"], record["updates"], record["skipped"]) == (6, 4, 2)
    assert all(np.isfinite(value).all() for value in trained(last, tmp_path / "out").values())
    assert "step 3: not finite" in capfd.readouterr().err
    Poisoned.bad = range(1, 6)
    with pytest.raises(UserError, match=r"step 4: not finite .* for 3 steps in a row"):
        run(toml, world, tmp_path / "b", max_skipped=3)


def test_a_jump_is_left_out_and_remembered(world: Any) -> None:
    guard = Guard(world, max_skipped=2, spike=6.0)
    for i in range(WINDOW):
        assert guard.fault(2 + 0.01 * (i % 3), 1.0 + 0.1 * (i % 2)) is None
        guard.accept(2 + 0.01 * (i % 3), 1.0 + 0.1 * (i % 2))
    again = Guard(world, max_skipped=2, spike=6.0)
    again.restore(json.loads(json.dumps(guard.recent)))
    for one in (guard, again):
        assert one.fault(2.03, 1.2) is None
        assert "loss 2.2 jumped" in (one.fault(2.2, 1.0) or "")
        assert "gradient norm 3 jumped" in (one.fault(2.0, 3.0) or "")
        assert "skipped" in one.skip(7, "a fault")
        with pytest.raises(UserError, match="step 8: a fault, for 2 steps in a row"):
            one.skip(8, "a fault")
    assert Guard(world, 2, 0.0).fault(1e9, 1e9) is None
    young = Guard(world, 2, 6.0)
    young.accept(1.0, 1.0)
    assert young.fault(9.0, 9.0) is None


def test_mfu_is_the_share_of_the_operations_that_the_documents_need(
    toml: Path, world: Any, tmp_path: Path
) -> None:
    run(toml, world, tmp_path, "steps=1", peak_flops=1e9)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[0])
    config = load_train_config(toml, [f"output={tmp_path / 'b'}"])
    trainer = Trainer(config, Machines(peak_flops=1e9), world)
    loaded = Loader(trainer.train_data, trainer.step, config, 0, 1).load(0)
    tokens = sum(b.tokens for b in loaded.parts)
    assert loaded.flops == sum(step_flops(trainer.model.config, work_of(b.packed)) for b in loaded.parts) > 0
    assert found["mfu"] == pytest.approx(loaded.flops / 1e9 * found["tokens_per_second"] / tokens, rel=1e-9)
    assert peak_of_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of_name("Abacus 1000") is None


def test_bad_requests(toml: Path, world: Any, tmp_path: Path) -> None:
    def refused(message: str, *changes: str, **machines: Any) -> None:
        with pytest.raises(UserError, match=message):
            Trainer(load_train_config(toml, [f"output={tmp_path}", *changes]), Machines(**machines), world)

    refused("trains on CUDA alone", attention="flex")
    refused('optimizer.name is "muon"', "optimizer.name=muon")
    refused("cannot be dealt into as many equal groups", replicas=3)


def test_no_mlx_is_needed(toml: Path, tmp_path: Path) -> None:
    """All modules, and a run of two steps, in a process where importing mlx is an error."""
    code = f"""
import pkgutil, sys
sys.modules["mlx"] = sys.modules["mlx.core"] = sys.modules["mlx.data"] = None
import mlx_transfusion.torch as path
from importlib import import_module
for module in pkgutil.iter_modules(path.__path__):
    import_module(f"mlx_transfusion.torch.{{module.name}}")
from mlx_transfusion.torch import export, train
assert train.main([{str(toml)!r}, "--set", "output={tmp_path}", "--set", "steps=2"]) == 0
assert export.main(["{tmp_path}/torch/step-00000002", "{tmp_path}/model"]) == 0
assert not [m for m in sys.modules if m.split(".")[0] == "mlx" and sys.modules[m] is not None]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert model_io.load(tmp_path / "model").model is not None


def test_bfloat16_is_the_arithmetic_alone(toml: Path, world: Any, tmp_path: Path) -> None:
    """Mixed precision: losses near those of float32 and not the same; weights, average and optimiser stay float32."""
    exact = run(toml, world, tmp_path / "float32", "steps=4")
    mixed = run(toml, world, tmp_path / "bfloat16", "steps=4", "dtype=bfloat16")
    rows = list(zip(metrics(tmp_path / "float32"), metrics(tmp_path / "bfloat16"), strict=True))
    for a, b in rows:
        for name in ("text_loss", "image_loss"):
            assert b[name] == pytest.approx(a[name], rel=0.02), (a["step"], name)
    assert any(a["image_loss"] != b["image_loss"] for a, b in rows)
    for which in ("average", "weights"):
        one, other = (trained(c, tmp_path / f"{which}-{i}", which) for i, c in enumerate((exact, mixed)))
        assert other.keys() == one.keys()
        for name, value in other.items():
            assert value.dtype == np.float32, name
            assert np.linalg.norm(value - one[name]) < 0.05 * np.linalg.norm(one[name]), name
    with pytest.raises(UserError, match='has no "trained": choose "average" or "weights"'):
        export(exact, tmp_path / "nothing", "trained")
    assert not (tmp_path / "nothing").exists()
