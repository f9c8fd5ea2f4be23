"""Tensor parallelism of the decoder blocks: every process of a group has some of the heads and of the feed-forward.

Queries, keys, values, gate and up are cut by their outputs, the layers behind them by their inputs, so a block adds
up twice over its group in the forward pass and twice in the backward pass (arXiv 1909.08053, section 3). The residual
stream, embeddings, head and patch layers are the same in all processes of a group. `parallel.shard` cuts the pieces
once more, over the processes that read other documents (FSDP2 on the other dimension of the mesh).
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mlx_transfusion.torch.model import Transfusion

HEADS = 1
"""The dimension of heads in queries and keys [B, H, T, E]."""


def split_blocks(model: Transfusion, mesh: DeviceMesh) -> None:
    """Cut the blocks of `model` over the processes of a one-dimensional mesh, in place."""
    # The block's input is whole everywhere; as one distributed tensor its gradient is added up once, not per layer.
    whole = (Replicate(), None, None, None, None)
    plan: dict[str, ParallelStyle] = {
        "self_attn": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "mlp.down_proj": RowwiseParallel(),
    }
    if model.config.qk_norm:
        # One gain for all heads: its gradient is a sum over the processes, as that of a layer cut along the heads.
        plan |= {
            f"self_attn.{x}_norm": SequenceParallel(sequence_dim=HEADS, use_local_output=True) for x in "qk"
        }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
