"""What the flags of a run may change: its speed and its memory, and no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

import torch._inductor.config as inductor  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_tools import attention_cases, make_batch, objective, to_torch_model  # noqa: E402

from mlx_transfusion import sequence  # noqa: E402
from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.sequence import Image, Text  # noqa: E402
from mlx_transfusion.torch.attention import attend, block_mask, dense_mask  # noqa: E402
from mlx_transfusion.torch.batch import Example, to_example  # noqa: E402
from mlx_transfusion.torch.model import Transfusion  # noqa: E402
from mlx_transfusion.torch.optimizer import make_optimizer  # noqa: E402
from mlx_transfusion.torch.parallel import compile_blocks  # noqa: E402
from mlx_transfusion.training.config import OptimizerConfig  # noqa: E402


@pytest.fixture(scope="module")
def twin(tiny_config: ModelConfig, make_model: Callable[..., Any]) -> Transfusion:
    grouped = dataclasses.replace(tiny_config, num_key_value_heads=2, qk_norm=True)
    return to_torch_model(make_model(grouped, seed=3))


@pytest.fixture(scope="module")
def example(twin: Transfusion) -> Example:
    return to_example(make_batch(twin.config), twin.config, torch.device("cpu"))


def gradients(model: Transfusion, example: Example) -> dict[str, Any]:
    model.zero_grad()
    objective(model, example)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_what_is_recomputed(twin: Transfusion, example: Example) -> None:
    """The same gradients, and as many operations as it says: none again, all blocks again, no products again."""
    found, work = {}, {}
    for name, every, keep in (("none", 0, False), ("all", 1, False), ("half", 2, False), ("cheap", 1, True)):
        twin.checkpointing, twin.keep_products = every, keep
        with FlopCounterMode(display=False) as counter:
            found[name] = gradients(twin, example)
        work[name] = counter.get_total_flops()
    twin.checkpointing, twin.keep_products = 0, False
    for name in ("all", "half", "cheap"):
        assert all(torch.equal(g, found[name][k]) for k, g in found["none"].items()), name
    assert work["cheap"] == work["none"]
    assert work["all"] - work["none"] == 2 * (work["half"] - work["none"]) > 0.2 * work["none"]


def test_compiled_blocks(twin: Transfusion, example: Example) -> None:
    """Traced and differentiated by torch.compile, both directions, without the code generator behind it."""
    wanted = gradients(twin, example)
    copy = Transfusion(twin.config)
    copy.load_state_dict(twin.state_dict())
    compile_blocks(copy, backend="aot_eager")
    for name, gradient in gradients(copy, example).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_fused_adamw(twin: Transfusion, example: Example) -> None:
    """One kernel for all weights, from the state that is there before the first step."""
    found = gradients(twin, example)
    after = []
    for fused in (False, True):
        copy = Transfusion(twin.config)
        copy.load_state_dict(twin.state_dict())
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), copy.parameters(), fused)
        for _ in range(3):
            for name, p in copy.named_parameters():
                p.grad = found[name].clone()
            optimizer.step()
        after.append([p.detach() for p in copy.parameters()])
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def packed_row() -> tuple[Any, Any]:
    """document and image [1, 4096] of a row as the paper packs it: captioned pictures of 256 patches, and text."""

    def body(i: int) -> list[Any]:
        return [Text((1, *range(40, 72), 4)), Image(i, 256), Text((5, 2))]

    rest = 4096 - 10 * 292
    packed = sequence.pack([*(body(i) for i in range(10)), [Text(tuple(range(6, 6 + rest)))]], 4096)
    assert packed.tokens == 4096  # no padding
    return tuple(torch.tensor(a).long() for a in (packed.document, packed.image))


@pytest.mark.parametrize("compiled", [False, True])
# In this process alone, and without headers compiled beforehand for a single kernel.
@inductor.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False})
def test_flex_attention_on_packed_rows(compiled: bool) -> None:
    """Eager on a full row of 4,096 positions; compiled, as on CUDA, on a row of several documents with padding."""
    if compiled:
        document, image = (torch.tensor(a).long() for a in attention_cases()[-1])
    else:
        document, image = packed_row()
    rows, t = document.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, t, 16, generator=generator) for heads in (2, 1, 1))
    flex = torch.compile(flex_attention) if compiled else flex_attention
    with torch.no_grad():
        found = flex(q, k, v, block_mask=block_mask(document, image), enable_gqa=True)
        wanted = attend(q, k, v, dense_mask(document, image))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6)
