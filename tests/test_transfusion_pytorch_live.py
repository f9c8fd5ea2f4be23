"""transfusion-pytorch as it is installed, on random models: the same text, the same flows, whatever the options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the package is torch's")
package = pytest.importorskip("transfusion_pytorch", reason="pip install transfusion-pytorch")

from convert_package import module  # noqa: E402

from mlx_transfusion.models.lucidrains import Lucidrains  # noqa: E402

convert, table = (module(name) for name in ("transfusion_pytorch", "table"))

TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More only wait for each other over models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(data: st.DataObject, values: Any) -> Any:
    return data.draw(st.sampled_from(values))


def arguments(data: st.DataObject) -> dict[str, Any]:
    """Of the constructor, as JSON has them."""
    dim, kinds, yes = draw(data, [8, 12, 24]), draw(data, [1, 1, 2]), [False, True]
    shapes = [draw(data, [[5], [2, 3], [3, 2], [2, 1, 2]]) for _ in range(kinds)]
    depth = draw(data, [1, 2, 3, 4])
    transformer = {
        "dim": dim, "depth": depth, "dim_head": draw(data, [4, 6, 8]),
        "heads": draw(data, [1, 2, 3]), "ff_expansion_factor": draw(data, [4.0, 2.5]),
        # The package builds deeper models without skips, and stops at an assertion when they run.
        "unet_skips": draw(data, yes) if depth == 1 else True,
        "use_value_residual": draw(data, yes), "qk_rmsnorm": draw(data, yes), "attn_laser": draw(data, yes),
        "attn_kwargs": {"gate_values": draw(data, yes), "softcap_value": draw(data, [50.0, 3.0])},
    }  # fmt: skip
    return {
        "num_text_tokens": draw(data, [5, 11]),
        "transformer": transformer,
        "dim_latent": [draw(data, [dim, 3, 5]) for _ in range(kinds)],
        "channel_first_latent": [draw(data, yes) for _ in range(kinds)],
        "add_pos_emb": [draw(data, yes) for _ in range(kinds)],
        "modality_default_shape": shapes,
        "modality_num_dim": [len(shape) for shape in shapes],
        "model_output_clean": draw(data, yes),
        "eps": draw(data, [1e-2, 0.3]),
    }


def build(given_: dict[str, Any], seed: int) -> tuple[Any, Lucidrains]:
    """The package's model with every number drawn at random, and ours with the same."""
    lists = {k: tuple(map(tuple, v)) if k == "modality_default_shape" else tuple(v)
             for k, v in given_.items() if isinstance(v, list)}  # fmt: skip
    theirs = package.Transfusion(**(given_ | lists)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name != "rotary_emb.freqs":
                scale = 0.5 if value.ndim < 2 else value.shape[-1] ** -0.5
                value.copy_(scale * torch.randn(value.shape, generator=generator))
    config = convert.read_config(json.loads(json.dumps(given_)), "config.json")
    tensors = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    ours = Lucidrains(config)
    entries = convert.entries(config)
    assert {e.source for e in entries} == tensors.keys()
    ours.load_weights(list(table.forward(entries, tensors).items()))
    return theirs, ours


def assert_close(ours: mx.array, theirs: Any) -> None:
    wanted = theirs.detach().numpy()
    # Flows of clean output are divided by as little as eps, and the errors with them.
    np.testing.assert_allclose(
        np.array(ours), wanted, rtol=TOLERANCE, atol=TOLERANCE * max(1, np.abs(wanted).max())
    )


def channels(x: Any, config: Any, kind: int) -> Any:
    """Latents [..., C] as the package's model of that modality takes them; a batch goes in front."""
    return (
        torch.movedim(x, -1, x.ndim - 1 - len(config.modalities[kind].shape))
        if config.modalities[kind].channel_first
        else x
    )


def last(x: Any, config: Any, kind: int) -> Any:
    """Back."""
    return (
        torch.movedim(x, x.ndim - 1 - len(config.modalities[kind].shape), -1)
        if config.modalities[kind].channel_first
        else x
    )


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(0, 1 << 30))
def test_random_models(data: st.DataObject, seed: int) -> None:
    theirs, ours = build(arguments(data), seed)
    c, rng = ours.config, np.random.default_rng(seed)

    def words(n: int) -> np.ndarray:
        return rng.integers(0, c.num_text_tokens, n)

    # A text.
    ids = np.stack([words(6), words(6)])
    hidden = ours.read_text(ids, np.ones(ids.shape, bool), ours.new_cache(2))
    with torch.no_grad():
        assert_close(ours.lm_head(hidden), theirs(torch.tensor(ids), return_loss=False))

    # Latents alone.
    for kind, modality in enumerate(c.modalities):
        shape = modality.shape
        x = rng.standard_normal((2, *shape, modality.dim_latent)).astype(np.float32)
        times = np.array([0.2, 0.9], np.float32)
        flow = ours.flow_alone(mx.array(x).reshape(2, prod(shape), -1), mx.array(times), kind)
        with torch.no_grad():
            expected = theirs.forward_modality(
                channels(torch.tensor(x), c, kind),
                times=torch.tensor(times),
                modality_type=kind,
                return_loss=False,
            )
        assert_close(flow.reshape(x.shape), last(expected, c, kind))

    # Text and latents in turn, through our cache and all at once there.
    sample, times, logits, flows = [], [], [], []
    cache = ours.new_cache(1)

    def read(ids: np.ndarray) -> None:
        sample.append(torch.tensor(ids))
        logits.append(ours.lm_head(ours.read_text(ids[None], np.ones((1, len(ids)), bool), cache)[0]))

    read(np.array([c.sos_id, *words(3), *c.opening(0, c.modalities[0].shape)]))
    for kind in (0, len(c.modalities) - 1):
        shape, time = c.modalities[kind].shape, float(rng.uniform())
        x = rng.standard_normal((*shape, c.modalities[kind].dim_latent)).astype(np.float32)
        sample.append((kind, channels(torch.tensor(x), c, kind)))
        times.append(time)
        flows.append(
            ours.flow(mx.array(x).reshape(1, prod(shape), -1), mx.array([time]), cache, kind, store=True)
        )
        read(np.array([c.eom_id(kind), *words(2), *c.opening(len(c.modalities) - 1, c.modalities[-1].shape)]))
    with torch.no_grad():
        embed, parse = theirs([sample], times=torch.tensor([times]), return_embed=True)
        expected = theirs.to_text_logits(embed)[0]
        kinds = [part[0] for part in sample if isinstance(part, tuple)]
        for i, (flow, kind) in enumerate(zip(flows, kinds, strict=True)):
            there = parse[kind][kinds[:i].count(kind)](embed)
            there = theirs.model_to_latent_projs[kind](there[None])[0]
            assert_close(flow[0].reshape(*c.modalities[kind].shape, -1), last(there, c, kind))
    rows = np.concatenate([
        np.full(prod(c.modalities[part[0]].shape), False) if isinstance(part, tuple) else np.full(len(part), True)
        for part in sample
    ])  # fmt: skip
    assert_close(mx.concatenate(logits), expected[torch.tensor(rows)])
