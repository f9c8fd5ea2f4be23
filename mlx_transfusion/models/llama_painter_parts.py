"""The weights that only pictures use, of a Llama that also paints (llama_painter.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.models.layers import Block, Norm
from mlx_transfusion.models.llama_painter_config import LlamaPainterConfig
from mlx_transfusion.models.patches import AngleEmbedding, PatchDecoder, PatchEncoder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """scale (x A) B: what is added to a frozen linear layer. Starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.lora_a = mx.random.uniform(-(inputs**-0.5), inputs**-0.5, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))

    def beside(self, linear: nn.Module) -> Callable[[mx.array], mx.array]:
        """A frozen layer with this in it: [..., inputs] -> [..., outputs]."""
        return lambda x: linear(x) + self._scale * ((x @ self.lora_a) @ self.lora_b)


class LowRankBlock(nn.Module):
    """Norms of its own, and a LowRank beside each matrix of a block of the text."""

    def __init__(self, config: LlamaPainterConfig) -> None:
        super().__init__()
        d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv = config.num_attention_heads * e, config.kv_heads * e
        sizes = [(d, heads), (d, kv), (d, kv), (heads, d), (d, f), (d, f), (f, d)]
        self.input_layernorm = Norm(d, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Norm(d, eps=config.rms_norm_eps)
        self.factors = {
            name: LowRank(*size, config.painter_rank, config.painter_scale)
            for name, size in zip(ATTENTION + FEED_FORWARD, sizes, strict=True)
        }

    def beside(self, block: Block) -> Block:
        """The text's block with these factors in it, made when it is used: loading may put another one there."""
        out, attention, mlp = copy.copy(block), copy.copy(block.self_attn), copy.copy(block.mlp)
        for name, factor in self.factors.items():
            part = attention if name in ATTENTION else mlp
            setattr(part, name, factor.beside(getattr(part, name)))
        out.self_attn, out.mlp = attention, mlp
        out.input_layernorm, out.post_attention_layernorm = (
            self.input_layernorm,
            self.post_attention_layernorm,
        )
        return out


class PictureSide(nn.Module):
    """All weights that only pictures use."""

    def __init__(self, config: LlamaPainterConfig) -> None:
        super().__init__()
        self.angle_embedding = AngleEmbedding(config.pictures)
        self.patch_encoder = PatchEncoder(config.pictures)
        self.layers: list[Block] | list[LowRankBlock] = (
            [LowRankBlock(config) for _ in config.painter_layers]
            if config.painter_rank
            else [Block(config, config.options) for _ in config.painter_layers]
        )
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.patch_decoder = PatchDecoder(config.pictures)
        self.wish = nn.Linear(config.hidden_size, 1)
        self.wish.weight, self.wish.bias = mx.zeros((1, config.hidden_size)), mx.array([-1.0])
