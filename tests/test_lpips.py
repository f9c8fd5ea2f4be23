"""LPIPS against its definition in PyTorch, on random weights; as the perceptual loss of an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_autoencoder_training import write_run

from mlx_transfusion.autoencoder.config import load_training
from mlx_transfusion.autoencoder.perceptual import load_lpips
from mlx_transfusion.autoencoder.trainer import Trainer
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.lpips import TRUNKS

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
SHIFT, SCALE = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]


def random_state(network: str) -> dict[str, Any]:
    """A state dict with the names that the package lpips gives."""
    generator = torch.Generator().manual_seed(0)
    state, channels = {}, 3
    for i, group in enumerate(TRUNKS[network].groups):
        for place, outputs, kernel, _, _ in group:
            name, fan = f"net.slice{i + 1}.{place}", channels * kernel**2
            weight = torch.randn(outputs, channels, kernel, kernel, generator=generator)
            state[f"{name}.weight"] = weight * (2 / fan) ** 0.5
            state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
            channels = outputs
        lin = torch.rand(1, channels, 1, 1, generator=generator)
        state[f"lin{i}.model.1.weight"] = state[f"lins.{i}.model.1.weight"] = lin
    state["scaling_layer.shift"] = torch.tensor(SHIFT)[None, :, None, None]
    state["scaling_layer.scale"] = torch.tensor(SCALE)[None, :, None, None]
    return state


def reference(network: str, state: dict[str, Any], x: Any, y: Any) -> Any:
    """The distance [B] as the paper's code defines it; pictures [B, 3, H, W]. Layers by torchvision's numbers."""
    F = torch.nn.functional
    strides = {"alex": {0: (4, 2), 3: (1, 2)}, "vgg": {}}[network]
    last = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[network]
    pools = {"alex": (2, 5), "vgg": (4, 9, 16, 23)}[network]
    convolutions = {
        int(n.split(".")[2]): n[: -len(".weight")] for n in state if n.startswith("net") and "weight" in n
    }

    def features(p: Any) -> list[Any]:
        p, out = (p - state["scaling_layer.shift"]) / state["scaling_layer.scale"], []
        for i in range(last[-1] + 1):
            if i in convolutions:
                stride, padding = strides.get(i, (1, 1))
                name = convolutions[i]
                p = F.conv2d(p, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)
            elif i in pools:
                p = F.max_pool2d(p, 3 if network == "alex" else 2, 2)
            else:
                p = F.relu(p)
            if i in last:
                out.append(p / (p.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    total = 0
    for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        total = total + F.conv2d((a - b) ** 2, state[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


def converted(folder: Path, network: str) -> tuple[dict[str, Any], Path]:
    state = random_state(network)
    torch.save(state, folder / "lpips.pth")
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(folder / "lpips.pth"), "--output", str(folder / "lpips")])
    return state, folder / "lpips"


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return converted(tmp_path_factory.mktemp("alex"), "alex")


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_distances_and_gradients_are_those_of_torch(network: str, tmp_path: Path) -> None:
    state, folder = converted(tmp_path, network)
    rng = np.random.default_rng(0)
    x, y = (
        rng.uniform(-1, 1, (2, 64 if network == "alex" else 32, 48, 3)).astype(np.float32) for _ in range(2)
    )
    tx, ty = (torch.tensor(p).permute(0, 3, 1, 2) for p in (x, y))
    tx.requires_grad_(True)
    wanted = reference(network, state, tx, ty).mean()
    wanted.backward()
    distance = load_lpips(folder)
    value, gradient = mx.value_and_grad(distance)(mx.array(x), mx.array(y))
    assert wanted.item() > 0.1
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    theirs = tx.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, theirs, atol=1e-4 * np.abs(theirs).max())
    assert distance(mx.array(y), mx.array(y)).item() == 0
    assert mx.abs(mx.grad(lambda b: distance(mx.array(x), b))(mx.array(y))).max().item() == 0


def test_it_is_the_loss_of_an_autoencoder(tmp_path: Path, alex: tuple[dict[str, Any], Path]) -> None:
    toml = write_run(tmp_path)
    settings = ["data.size=64", "loss.perceptual=0.5", f"loss.lpips={alex[1]}", "loss.gan_start=9"]
    trainer = Trainer(load_training(toml, settings))
    weights = trainer.state.weights["autoencoder"]
    pixels = trainer.train.batch(0, 4)
    values = trainer._train_step(pixels)
    assert values["perceptual"] > 0
    assert values["identity"] == 0  # and with it no EfficientNet is read
    assert trainer.state.weights["autoencoder"] is not weights


def test_anything_else_is_refused(tmp_path: Path) -> None:
    toml = write_run(tmp_path)
    with pytest.raises(
        UserError, match=r"no config.json: expected a folder that mlx-transfusion convert made"
    ):
        Trainer(load_training(toml, ["loss.perceptual=1.0", 'loss.lpips="pictures"']))
    (tmp_path / "pictures" / "config.json").write_text('{"model_type": "inception_v3"}')
    with pytest.raises(UserError, match="model_type is 'inception_v3', expected a converted LPIPS"):
        Trainer(load_training(toml, ["loss.perceptual=1.0", 'loss.lpips="pictures"']))
