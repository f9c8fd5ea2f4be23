"""What a block's backward pass computes again: everything, or everything but products and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

KEPT = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "_c10d_functional": ("all_reduce",),  # of blocks that several processes share
}
"""Operators whose results are kept: they take most of the time."""


def keep_products() -> tuple[Any, Any]:
    """The contexts of `torch.utils.checkpoint.checkpoint` for a block whose products and attention are kept."""
    kept = [
        getattr(getattr(torch.ops, library), name).default
        for library, names in KEPT.items()
        for name in names
        if hasattr(getattr(torch.ops, library), name)
    ]
    return create_selective_checkpoint_contexts([*kept, torch.ops.higher_order.flex_attention])
