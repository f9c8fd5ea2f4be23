"""The model of discrete pictures once more, in plain PyTorch (no code shared with the package)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten

from mlx_transfusion.models.discrete import Discrete


def logits(model: Discrete, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] after every token of ids [B, T]."""
    c = model.config
    w = {name: torch.from_numpy(np.array(value)) for name, value in tree_flatten(model.parameters())}
    x = w["model.embed_tokens.weight"][ids]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], w[name], c.rms_norm_eps)

    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."

        def attention(x: torch.Tensor, at: str = at) -> torch.Tensor:
            b, t, _ = x.shape

            def heads(name: str, count: int) -> torch.Tensor:
                return (x @ w[f"{at}self_attn.{name}.weight"].T).view(b, t, count, c.head_dim).transpose(1, 2)

            q, k = heads("q_proj", c.num_attention_heads), heads("k_proj", c.kv_heads)
            v = heads("v_proj", c.kv_heads)
            if c.qk_norm:
                q, k = norm(q, f"{at}self_attn.q_norm.weight"), norm(k, f"{at}self_attn.k_norm.weight")
            q, k = rotate(q, c.rope_theta), rotate(k, c.rope_theta)
            groups = c.num_attention_heads // c.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = q @ k.transpose(-1, -2) / c.head_dim**0.5
            hidden = torch.full((t, t), float("-inf")).triu(1)
            out = (scores + hidden).softmax(-1) @ v
            return out.transpose(1, 2).reshape(b, t, -1) @ w[f"{at}self_attn.o_proj.weight"].T

        def feed_forward(x: torch.Tensor, at: str = at) -> torch.Tensor:
            gate = x @ w[f"{at}mlp.gate_proj.weight"].T
            gate = F.silu(gate) if c.hidden_act == "silu" else F.relu(gate)
            return (gate * (x @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T

        for f, place in ((attention, "input_layernorm"), (feed_forward, "post_attention_layernorm")):
            gain = f"{at}{place}.weight"
            x = x + (norm(f(x), gain) if c.post_norm else f(norm(x, gain)))
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions of [B, H, T, E], pairs in the two halves of a head."""
    t, e = x.shape[-2:]
    angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, e, 2) / e)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
