"""The same model once more, in plain PyTorch: written from the papers and the config, not from the MLX code.

It takes the arrays of a packed batch and a flat dictionary of weights named as in model.safetensors. Nothing here
is fused, cached or clever.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mlx_transfusion.config import ModelConfig

Weights = dict[str, torch.Tensor]


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate halves, as Llama does. x [B, H, T, E], positions [B, T]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = positions[:, None, :, None].to(x.dtype) * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], -1)


def attention(
    w: Weights, name: str, c: ModelConfig, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    b, t, _ = x.shape

    def heads(projection: str, count: int) -> torch.Tensor:
        return linear(w, f"{name}.{projection}", x).view(b, t, count, c.head_dim).transpose(1, 2)

    q, k, v = heads("q_proj", c.num_attention_heads), heads("k_proj", c.kv_heads), heads("v_proj", c.kv_heads)
    if c.qk_norm:
        q = rms_norm(q, w[f"{name}.q_norm.weight"], c.rms_norm_eps)
        k = rms_norm(k, w[f"{name}.k_norm.weight"], c.rms_norm_eps)
    q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
    k, v = (y.repeat_interleave(c.num_attention_heads // c.kv_heads, 1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)
    scores = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return linear(w, f"{name}.o_proj", (scores @ v).transpose(1, 2).reshape(b, t, -1))


def mlp(w: Weights, name: str, c: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    act = F.silu if c.hidden_act == "silu" else F.relu
    return linear(
        w, f"{name}.down_proj", act(linear(w, f"{name}.gate_proj", x)) * linear(w, f"{name}.up_proj", x)
    )


def angle_vector(w: Weights, c: ModelConfig, angle: torch.Tensor) -> torch.Tensor:
    """Sines and cosines at frequencies from 1 down to 1/100 in equal ratios, then two layers. [M] -> [M, D]."""
    n = c.time_frequencies
    frequencies = torch.tensor([100.0 ** (-i / max(1, n - 1)) for i in range(n)], dtype=angle.dtype)
    x = angle[:, None] * frequencies
    return linear(
        w, "angle_embedding.fc2", F.silu(linear(w, "angle_embedding.fc1", torch.cat([x.cos(), x.sin()], 1)))
    )


def forward(
    w: Weights, c: ModelConfig, batch: dict[str, torch.Tensor], patches: torch.Tensor, angle: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all positions [B, T, V] and predictions for the noisy patches [M, N, P].

    `batch`: ids, image (index or -1), document (index or -1), position, patch_row of a packed batch, [B, T] each.
    """
    m, n, _ = patches.shape
    embedded = angle_vector(w, c, angle)
    tokens = linear(w, "patch_encoder.proj", patches) + embedded[:, None]
    if c.patch_positions == "learned":
        tokens = tokens + w["patch_encoder.position"]
    is_patch = batch["image"] >= 0
    x = w["embed_tokens.weight"][batch["ids"]]
    x = torch.where(is_patch[..., None], tokens.reshape(m * n, -1)[batch["patch_row"]], x)

    document, image = batch["document"], batch["image"]
    t = torch.arange(document.shape[1])
    same_document = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    same_image = (image[:, :, None] == image[:, None, :]) & is_patch[:, :, None]
    mask = (same_document & ((t[:, None] >= t) | same_image)) | (t[:, None] == t)
    for i in range(c.num_hidden_layers):
        name = f"layers.{i}"
        h = rms_norm(x, w[f"{name}.input_layernorm.weight"], c.rms_norm_eps)
        x = x + attention(w, f"{name}.self_attn", c, h, batch["position"], mask[:, None])
        h = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], c.rms_norm_eps)
        x = x + mlp(w, f"{name}.mlp", c, h)
    x = rms_norm(x, w["norm.weight"], c.rms_norm_eps)

    hidden = torch.zeros(m * n, x.shape[-1], dtype=x.dtype)
    hidden = hidden.index_put((batch["patch_row"][is_patch],), x[is_patch]).view(m, n, -1)
    prediction = linear(w, "patch_decoder.proj", hidden)
    if c.patch_skip:
        prediction = prediction + linear(w, "patch_decoder.skip_gain", F.silu(embedded))[:, None] * patches
    return linear(w, "lm_head", x), prediction


def losses(
    logits: torch.Tensor,
    prediction: torch.Tensor,
    batch: dict[str, torch.Tensor],
    x0: torch.Tensor,
    noise: torch.Tensor,
    angle: torch.Tensor,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean text loss over the tokens that text predicts, and mean squared error over all image elements."""
    text = (batch["image"] < 0) & (batch["document"] >= 0)
    pairs = text[:, :-1] & text[:, 1:] & (batch["document"][:, :-1] == batch["document"][:, 1:])
    language = F.cross_entropy(logits[:, :-1][pairs], batch["ids"][:, 1:][pairs])
    a = angle[:, None, None]
    target = noise if kind == "epsilon" else a.cos() * noise - a.sin() * x0
    return language, F.mse_loss(prediction, target)
