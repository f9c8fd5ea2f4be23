"""sCM and ECT by PyTorch against MLX: tangents, losses, gradients, and whole steps of a distillation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from mlx.utils import tree_flatten  # noqa: E402
from tiny_training import write_run  # noqa: E402
from torch_tools import to_torch_model  # noqa: E402

from mlx_transfusion import consistency, easy_consistency, model_io  # noqa: E402
from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch import consistency as theirs  # noqa: E402
from mlx_transfusion.torch import easy_consistency as their_ect  # noqa: E402
from mlx_transfusion.torch.attention import written_out  # noqa: E402
from mlx_transfusion.torch.export import export  # noqa: E402
from mlx_transfusion.torch.machines import Machines  # noqa: E402
from mlx_transfusion.torch.parallel import processes  # noqa: E402
from mlx_transfusion.torch.trainer import Trainer, train  # noqa: E402
from mlx_transfusion.training.config import load_train_config  # noqa: E402
from mlx_transfusion.training.trainer import train as train_with_mlx  # noqa: E402

UNET = {"patch_encoder": "unet", "unet_channels": 4, "unet_blocks": 1}
GROUPED = {"num_key_value_heads": 2, "qk_norm": True, "patch_skip": True, "patch_positions": "learned"}


def close(a: Any, b: Any, limit: float = 1e-4) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.linalg.norm(a - b) < limit * np.linalg.norm(b), (a, b)


@pytest.mark.parametrize("variant", [{}, GROUPED, UNET], ids=["plain", "grouped", "unet"])
def test_tangent_loss_and_gradients(
    variant: dict[str, Any], tiny_config: ModelConfig, make_model: Callable[..., Any]
) -> None:
    model = make_model(dataclasses.replace(tiny_config, **variant), seed=4, scale=0.15)
    twin, c, rng = to_torch_model(model), model.config, np.random.default_rng(1)
    ids, lengths = rng.integers(6, 40, (3, 4)).astype(np.int32), np.array([4, 2, 3], np.int32)
    shape = (3, c.patches_per_image, c.patch_dim)
    x, v = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    angle = np.array([0.3, 0.9, 1.5], np.float32)
    prefix = [(mx.stop_gradient(k), mx.stop_gradient(w)) for k, w in model.read_prefix(mx.array(ids))[1]]
    network = partial(model.paint, prefix=prefix, lengths=mx.array(lengths))
    value = consistency.value_and_derivative(network, mx.array(x), mx.array(angle), mx.array(v))
    raw = consistency.tangent(value, mx.array(x), mx.array(angle), mx.array(v), 0.7)
    with torch.no_grad():
        _, past = twin.read_prefix(torch.tensor(ids).long())
    arrays = torch.tensor(x), torch.tensor(angle), torch.tensor(v)
    paint = partial(twin.paint, prefix=past, lengths=torch.tensor(lengths))
    slope = theirs.derivative(partial(paint, attention=written_out), *arrays)
    their_value = paint(*arrays[:2])
    their_raw = theirs.tangent(their_value, slope, *arrays, 0.7)
    close(their_value.detach(), value.network, 1e-5)
    close(slope, value.derivative)
    close(their_raw, raw)
    weight = np.array([0.2, -0.1, 0.5], np.float32)
    for how in ("normalize", "clip", "none"):
        g, their_g = consistency.rescale(raw, how), theirs.rescale(their_raw, how)
        wanted = consistency.image_losses(value.network, g, mx.array(weight))
        close(theirs.image_losses(their_value, their_g, torch.tensor(weight)).detach(), wanted)

    def loss(w: Any) -> mx.array:
        model.update(w)
        f = network(mx.array(x), mx.array(angle))
        return consistency.image_losses(f, consistency.rescale(raw), mx.array(weight)).sum()

    weights = model.parameters()
    gradients = dict(tree_flatten(mx.grad(loss)(weights)))
    model.update(weights)
    theirs.image_losses(their_value, theirs.rescale(their_raw), torch.tensor(weight)).sum().backward()
    for name, p in twin.named_parameters():
        if p.grad is not None and np.array(gradients[name]).any():
            close(p.grad, gradients[name])


@pytest.mark.parametrize("at_noise", [0.5, 0.01])
def test_both_points_of_ect_and_their_difference(at_noise: float) -> None:
    rng = np.random.default_rng(2)
    x, v, f, f_earlier = (rng.normal(size=(6, 4, 5)).astype(np.float32) for _ in range(4))
    angle = np.array([0.0, 0.01, 0.4, 1.1, 1.5, np.pi / 2], np.float32)
    gap = easy_consistency.relative_gap(mx.array(angle), at_noise)
    their_gap = their_ect.relative_gap(torch.tensor(angle), at_noise)
    close(their_gap, gap, 1e-6)
    ours = [mx.array(a) for a in (x, angle, v)]
    twins = [torch.tensor(a) for a in (x, angle, v)]
    point, their_point = easy_consistency.earlier(*ours, gap), their_ect.earlier(*twins, their_gap)
    for a, b in zip(their_point, point, strict=True):
        close(a, b, 1e-5)
    d = easy_consistency.tangent(mx.array(f), mx.array(f_earlier), *ours, gap, point)
    their_d = their_ect.tangent(torch.tensor(f), torch.tensor(f_earlier), *twins, their_gap, their_point)
    close(their_d, d)
    for how in ("normalize", "clip", "none"):
        close(their_ect.rescale(their_d, how), easy_consistency.rescale(d, how))


def test_weight_of_the_loss(tiny_config: ModelConfig) -> None:
    ours, twin = consistency.LossWeight(), theirs.LossWeight()
    rng = np.random.default_rng(0)
    state = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in tree_flatten(ours.parameters())}
    ours.load_weights([(k, mx.array(v)) for k, v in state.items()])
    twin.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    angle = np.linspace(0, 1.57, 9).astype(np.float32)
    np.testing.assert_allclose(
        twin(torch.tensor(angle)).detach(), ours(mx.array(angle)), rtol=1e-5, atol=1e-5
    )


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: Tokenizer,
    tiny_config: ModelConfig,
    make_model: Any,
) -> tuple[Path, Path]:
    """A training TOML and the folder of a teacher that fits it."""
    folder = tmp_path_factory.mktemp("distill")
    toml = write_run(folder, tiny_tokenizer)
    config = dataclasses.replace(tiny_config, intermediate_size=48, time_frequencies=8, prediction="epsilon")
    return toml, model_io.save_model(folder / "teacher", make_model(config, scale=0.1), tiny_tokenizer)


@pytest.mark.parametrize(
    "scales", ["guidance=3.0", "guidance_range=[1.0, 4.0]", 'guidance=2.0\nmethod="ect"\ngap_stages=3']
)
def test_three_steps_of_distillation_are_those_of_mlx(
    scales: str, teacher: tuple[Path, Path], tmp_path: Path
) -> None:
    toml, folder = teacher
    text = toml.read_text().replace("[model]", "[unused]").split("[unused]")
    rest = text[1][text[1].index("[[data.train]]") :]
    table = f'\n[consistency]\nteacher = "{folder}"\n{scales}\nadaptive_weight = false\ntangent_warmup = 2\n'
    distill = toml.with_name("distill.toml")
    distill.write_text(text[0] + rest + table)
    shared = ["steps=3", "save_every=3", "compile=false", "accumulate=2"]
    train_with_mlx(load_train_config(distill, [f"output={tmp_path / 'mlx'}", *shared]))
    with processes() as world:
        last = train(load_train_config(distill, [f"output={tmp_path / 'torch'}", *shared]), Machines(), world)
    for a, b in zip(*(lines(tmp_path / side) for side in ("mlx", "torch")), strict=True):
        for name in ("text_loss", "image_loss", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    out = model_io.load(export(last, tmp_path / "student"))
    assert out.config.prediction == "velocity"
    assert out.extra["objective"]["name"] == "consistency"
    assert out.extra["objective"]["method"] == ("ect" if "ect" in scales else "scd")


def test_options_of_mlx_alone_are_refused(teacher: tuple[Path, Path], tmp_path: Path) -> None:
    toml, folder = teacher
    with processes() as world:
        for change in (
            'consistency.method="scm_hops"',
            'consistency.student="painter"',
            'consistency.text="teacher"',
            "dtype=bfloat16",
        ):
            changes = [f"output={tmp_path}", f"consistency.teacher={folder}", f"init={folder}", change]
            with pytest.raises(UserError):
                Trainer(load_train_config(toml, changes), Machines(), world)


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
