"""The PyTorch model against the MLX one: same weights, same packed batch, float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from mlx.utils import tree_flatten  # noqa: E402
from torch_tools import attention_cases, make_batch, objective, to_torch_model, train_config  # noqa: E402

from mlx_transfusion import model_io, sequence  # noqa: E402
from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch import folder  # noqa: E402
from mlx_transfusion.torch.attention import attend, block_mask, dense_mask, written_out  # noqa: E402
from mlx_transfusion.torch.batch import to_example  # noqa: E402
from mlx_transfusion.torch.initial import initialise  # noqa: E402
from mlx_transfusion.torch.model import Transfusion  # noqa: E402
from mlx_transfusion.training.config import OptimizerConfig  # noqa: E402
from mlx_transfusion.training.optimizer import make_optimizer  # noqa: E402
from mlx_transfusion.training.step import Step, to_arrays  # noqa: E402

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {
        "num_key_value_heads": 2, "qk_norm": True, "hidden_act": "relu", "patch_positions": "learned",
        "patch_skip": True, "prediction": "epsilon",
    },
    "unet": {"patch_encoder": "unet", "unet_channels": 8, "unet_blocks": 2},
    "unet-skip": {"patch_encoder": "unet", "unet_channels": 8, "unet_blocks": 1, "patch_skip": True, "qk_norm": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: Callable[..., Any]
) -> tuple[Any, Any]:
    """An MLX model and its twin."""
    model = make_model(dataclasses.replace(tiny_config, **VARIANTS[request.param]), seed=3)
    return model, to_torch_model(model)


def test_same_parameters(pair: tuple[Any, Any]) -> None:
    ours, theirs = (dict(tree_flatten(pair[0].parameters())), dict(pair[1].named_parameters()))
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


def test_logits_predictions_and_losses(pair: tuple[Any, Any]) -> None:
    model, twin = pair
    batch = make_batch(model.config)
    arrays, (target,), _, _ = to_arrays(batch, model)
    logits, prediction = model(arrays)
    example = to_example(batch, model.config, CPU)
    np.testing.assert_allclose(example.target, target, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        their_logits, their_prediction = twin(example.arrays)
        _, sums = objective(twin, example)
    real = batch.text_targets
    np.testing.assert_allclose(their_logits[:real], np.array(logits)[:real], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(their_prediction, prediction, rtol=1e-5, atol=1e-5)
    step = Step(model, make_optimizer(OptimizerConfig()), train_config(compile=False))
    _, wanted = step.gradients(model.parameters(), batch, batch.text_targets, len(batch.angle), 0)
    np.testing.assert_allclose(sums, wanted, rtol=1e-6)


def test_gradients(pair: tuple[Any, Any]) -> None:
    model, twin = pair
    batch = make_batch(model.config)
    step = Step(model, make_optimizer(OptimizerConfig()), train_config(compile=False))
    wanted, _ = step.gradients(model.parameters(), batch, batch.text_targets, len(batch.angle), 0)
    twin.zero_grad()
    objective(twin, to_example(batch, model.config, CPU))[0].backward()
    theirs = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    for name, value in tree_flatten(wanted):
        error = np.linalg.norm(np.array(value) - theirs[name]) / np.linalg.norm(theirs[name])
        assert error < 1e-4, (name, error)


def test_checkpointing_changes_nothing(pair: tuple[Any, Any]) -> None:
    model, twin = pair
    example = to_example(make_batch(model.config), model.config, CPU)
    found = []
    for every in (0, 1, 2):
        twin.checkpointing = every
        twin.zero_grad()
        objective(twin, example)[0].backward()
        found.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    twin.checkpointing = 0
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.equal(gradient, other[name]), name


def test_a_prefix_and_a_picture(pair: tuple[Any, Any]) -> None:
    """`read_prefix` and `paint`, with padded prefixes, as in distillation; the plain attention gives the same."""
    model, twin = pair
    c, rng = model.config, np.random.default_rng(5)
    ids, lengths = rng.integers(6, 40, (3, 5)).astype(np.int32), np.array([5, 2, 3], np.int32)
    x = rng.normal(size=(3, c.patches_per_image, c.patch_dim)).astype(np.float32)
    angle = np.array([0.2, 0.9, 1.5], np.float32)
    _, prefix = model.read_prefix(mx.array(ids))
    wanted = model.paint(mx.array(x), mx.array(angle), prefix, mx.array(lengths))
    with torch.no_grad():
        _, theirs = twin.read_prefix(torch.tensor(ids).long())
        for form in (attend, written_out):
            out = twin.paint(
                torch.tensor(x), torch.tensor(angle), theirs, torch.tensor(lengths), attention=form
            )
            np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_without_pictures_gives_every_weight_a_gradient(tiny_config: ModelConfig) -> None:
    twin = Transfusion(tiny_config)
    initialise(twin, tiny_config, 0)
    objective(twin, to_example(make_batch(tiny_config, pictures=False), tiny_config, CPU))[0].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in twin.parameters())
    assert not twin.patch_encoder.proj.weight.grad.any()


@pytest.mark.parametrize("case", range(len(attention_cases())))
def test_every_mask_case_in_all_forms(case: int) -> None:
    """Dense, written out, and FlexAttention with its block mask; the last has gradients on CUDA alone."""
    document, image = (torch.tensor(a).long() for a in attention_cases()[case])
    mask = dense_mask(document, image)
    np.testing.assert_array_equal(mask, sequence.attention_mask(document.numpy(), image.numpy()))
    torch.manual_seed(case)
    b, t = document.shape
    q, k, v = (torch.randn(b, heads, t, 16, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for form in (attend, written_out):
        out = form(q, k, v, mask)
        gradients = torch.autograd.grad(out.sin().sum(), (q, k, v))
        found.append([x.detach().numpy() for x in (out, *gradients)])
    for a, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        flex = attend(q.detach(), k.detach(), v.detach(), block_mask(document, image))
    np.testing.assert_allclose(flex, found[0][0], rtol=1e-5, atol=2e-6)


def test_the_model_with_either_mask(tiny_config: ModelConfig, make_model: Callable[..., Any]) -> None:
    twin = to_torch_model(make_model(dataclasses.replace(tiny_config, num_key_value_heads=2, hidden_size=64)))
    batch = make_batch(twin.config)
    with torch.no_grad():
        dense, flex = (twin(to_example(batch, twin.config, CPU, form).arrays) for form in (False, True))
    for a, b in zip(dense, flex, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has gradients on CUDA alone")
def test_gradients_with_either_mask(tiny_config: ModelConfig, make_model: Callable[..., Any]) -> None:
    cuda = torch.device("cuda")
    config = dataclasses.replace(tiny_config, num_key_value_heads=2, hidden_size=64)
    twin = to_torch_model(make_model(config)).to(cuda)
    found = []
    for flex in (False, True):
        twin.zero_grad()
        objective(twin, to_example(make_batch(config), config, cuda, flex))[0].backward()
        found.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() < 1e-4 * gradient.norm(), name


def test_weights_there_and_back_bit_for_bit(
    pair: tuple[Any, Any], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, _ = pair
    first = model_io.save_model(tmp_path / "mlx", model, tiny_tokenizer)
    twin, extra = folder.load(first)
    second = folder.save(
        tmp_path / "torch", twin.config, dict(twin.named_parameters()), tiny_tokenizer, extra
    )
    back = model_io.load(second)
    theirs = dict(tree_flatten(back.model.parameters()))
    for name, value in tree_flatten(model.parameters()):
        assert np.array_equal(np.array(value), np.array(theirs[name])), name
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    assert back.config == model.config


def test_first_weights_have_the_distribution_of_mlx(tiny_config: ModelConfig) -> None:
    from mlx_transfusion.models.transfusion import Transfusion as Ours

    config = dataclasses.replace(
        tiny_config, hidden_size=64, patch_encoder="unet", unet_channels=8, patch_positions="learned",
        qk_norm=True, patch_skip=True,
    )  # fmt: skip
    twin = Transfusion(config)
    initialise(twin, config, 0)
    mx.random.seed(0)
    wanted = dict(tree_flatten(Ours(config).parameters()))
    for name, value in twin.named_parameters():
        ours, theirs = np.array(wanted[name]), value.detach().numpy()
        n = max(8, ours.size)
        assert theirs.std() == pytest.approx(ours.std(), abs=1e-9, rel=3 / n**0.5), name
        assert abs(theirs.mean() - ours.mean()) <= 6 * ours.std() / n**0.5, name
        assert np.abs(theirs).max() <= 1.7 * np.abs(ours).max() + 1e-9, name
