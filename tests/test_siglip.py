"""SigLIP's vision transformer equals the official code's numbers, and transformers' own on any sizes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from janusflow_tools import channels_last, golden, model

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.siglip import Siglip, SiglipConfig


def pictures() -> mx.array:
    """The golden's six picture slots, [6, 24, 24, 3]."""
    return channels_last(golden()["und.pixel_values"]).reshape(6, 24, 24, 3)


def test_the_features_are_the_official_ones() -> None:
    tower = model().vision_und_enc_model
    first = tower.blocks[0](tower.patch_embed(pictures()) + tower.pos_embed)
    assert mx.abs(first - golden()["und.vit.block0"]).max().item() < 1e-5
    assert mx.abs(tower(pictures()) - golden()["und.vit.features"]).max().item() < 1e-5


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 8]),
    layers=st.integers(1, 3),
    patch=st.sampled_from([2, 4]),
    grid=st.integers(1, 3),
    wide=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_it_is_the_tower_of_transformers(
    heads: int, head_dim: int, layers: int, patch: int, grid: int, wide: int, seed: int
) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch's transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    torch.manual_seed(seed)
    config = transformers.SiglipVisionConfig(
        hidden_size=heads * head_dim, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=patch * grid, patch_size=patch, hidden_act="gelu", vision_use_head=False,
    )  # fmt: skip
    theirs = transformers.SiglipVisionModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Siglip(SiglipConfig(patch * grid, patch, heads * head_dim, layers, heads, wide))
    ours.load_weights(list(from_transformers(theirs.state_dict(), layers).items()), strict=True)
    pixels = np.random.default_rng(seed).uniform(-1, 1, (2, patch * grid, patch * grid, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(pixels))), expected, atol=2e-5)


def from_transformers(state: dict, layers: int) -> dict[str, mx.array]:  # type: ignore[type-arg]
    """transformers' names and three matrices for queries, keys and values -> ours."""
    s = {name.removeprefix("vision_model."): value.numpy() for name, value in state.items()}
    patch = s["embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1)
    out = {"patch_embed.proj.weight": patch, "patch_embed.proj.bias": s["embeddings.patch_embedding.bias"]}
    out["pos_embed"] = s["embeddings.position_embedding.weight"][None]
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"norm.{kind}"] = s[f"post_layernorm.{kind}"]
        for i in range(layers):
            block = f"encoder.layers.{i}"
            out |= {
                f"blocks.{i}.{ours}.{kind}": s[f"{block}.{theirs}.{kind}"] for theirs, ours in names.items()
            }
            qkv = [s[f"{block}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(qkv)
    return {name: mx.array(value) for name, value in out.items()}


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 30), ("patch_size", 5), ("num_hidden_layers", 0)]
)
def test_sizes_that_do_not_fit_are_refused(field: str, value: int) -> None:
    sizes = {"image_size": 24, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 64}  # fmt: skip
    with pytest.raises(UserError, match=f"vision config: .*{field}"):
        SiglipConfig(**(sizes | {field: value}))
