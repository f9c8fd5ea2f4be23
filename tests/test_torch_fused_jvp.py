"""The fused attention of sCM's derivative: its wiring, with a stand-in for the kernel, against plain attention."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from torch.autograd import forward_ad  # noqa: E402

from mlx_transfusion.config import ModelConfig  # noqa: E402
from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.torch import consistency  # noqa: E402
from mlx_transfusion.torch.attention import written_out  # noqa: E402
from mlx_transfusion.torch.fused_jvp import forward_mode_attention, square  # noqa: E402
from mlx_transfusion.torch.initial import initialise  # noqa: E402
from mlx_transfusion.torch.model import Transfusion  # noqa: E402


class StandIn:
    """JVPAttn of jvp-flash-attention 0.14.0 as seen from outside: its call, its demands, how it finds tangents."""

    calls = 0

    @staticmethod
    def fwd_dual(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, causal: bool = False,
        sm_scale: float | None = None, warp_specialize: bool = True, USE_TMA: bool = True,
        verify_attn_mask: bool = True,
    ) -> Any:  # fmt: skip
        StandIn.calls += 1
        b, h, n, e = q.shape
        assert q.shape == k.shape == v.shape
        assert e in {16, 32, 64, 128, 256}
        assert n % 2 == 0
        assert n >= 32
        assert attn_mask.shape == (b, h, n, n)
        assert attn_mask.dtype == torch.bool
        assert bool(attn_mask.any(-1).all())
        (q, qt), (k, kt), (v, vt) = map(forward_ad.unpack_dual, (q, k, v))
        assert not any(t is None for t in (qt, kt, vt))
        # Output and tangent by the formula of arXiv 2410.11081, appendix F.
        scale = e**-0.5
        p = (q @ k.mT * scale).masked_fill(~attn_mask, -torch.inf).softmax(-1)
        ts = (qt @ k.mT + q @ kt.mT) * scale
        out = p @ v
        return forward_ad.make_dual(out, (p * ts) @ v - (p * ts).sum(-1, keepdim=True) * out + p @ vt)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("patch_size", "prefix_length"), [(4, 5), (2, 5), (1, 6)], ids=["short", "odd", "even"]
)
def test_derivative_of_a_painting_model(
    patch_size: int, prefix_length: int, bidirectional: bool, tiny_config: ModelConfig
) -> None:
    """4, 16 and 64 patches behind padded prefixes; grouped queries; short, odd and even numbers of keys."""
    config = dataclasses.replace(
        tiny_config, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, patch_size=patch_size,
        image_attention="bidirectional" if bidirectional else "causal",
    )  # fmt: skip
    model, rng = Transfusion(config), np.random.default_rng(0)
    initialise(model, config, 0)
    with torch.no_grad():
        for p in model.patch_decoder.parameters():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor(rng.integers(6, 40, (3, prefix_length)))
        _, prefix = model.read_prefix(ids)
    shape = (3, config.patches_per_image, config.patch_dim)
    x, v = (torch.tensor(rng.normal(size=shape).astype(np.float32)) for _ in range(2))
    angle = torch.tensor([0.3, 0.9, 1.5])
    lengths = torch.tensor([prefix_length, 2, 3])
    before = StandIn.calls
    plain, fused = (
        consistency.derivative(
            partial(model.paint, prefix=prefix, lengths=lengths, attention=form), x, angle, v
        )
        for form in (written_out, partial(square, StandIn.fwd_dual))
    )
    assert StandIn.calls == before + config.num_hidden_layers
    assert plain.norm() > 0
    assert (fused - plain).norm() < 1e-5 * plain.norm()


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert forward_mode_attention("plain", torch.device("cpu"), 64) is written_out
    with pytest.raises(UserError, match="runs on CUDA alone"):
        forward_mode_attention("flash", torch.device("cpu"), 64)
    with pytest.raises(UserError, match="heads are 48 wide"):
        forward_mode_attention("flash", cuda, 48)
    module = "jvp_flash_attention.jvp_attention"
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'mlx-transfusion\[jvp\]'"):
        forward_mode_attention("flash", cuda, 64)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(JVPAttn=StandIn))
    chosen = forward_mode_attention("flash", cuda, 64)
    assert isinstance(chosen, partial)
    assert chosen.args == (StandIn.fwd_dual,)
