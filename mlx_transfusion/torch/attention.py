"""Who may look at whom, twice: as a dense mask for any device, and as a block mask for FlexAttention.

The rule is that of `sequence.attention_mask`: causal, bidirectional among the patches of one picture, never across
documents; padding sees itself. The dense form costs T*T booleans a row and serves as the reference; the block form
keeps no such array, and skips whole blocks that nobody may look at.
Shapes: B rows, T queries, S keys, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask: TypeAlias = "Tensor | BlockMask | None"
"""Boolean [B, 1, T, S] (True = look), a block mask of the same rule, or None: everything is visible."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""A form of attention: q, k, v and mask -> what `attend` gives."""

BLOCK = 128
"""Side of FlexAttention's blocks."""


def dense_mask(document: Tensor, image: Tensor, bidirectional: bool = True) -> Tensor:
    """The rule as booleans [B, 1, T, T]. document, image: the int arrays [B, T] of `PackedBatch`.

    bidirectional: a patch sees its whole picture, else only what stands before it.
    """
    place = torch.arange(document.shape[1], device=document.device)
    query, key = place[:, None], place[None]
    same_document = (document[:, :, None] == document[:, None]) & (document[:, :, None] >= 0)
    same_image = (image[:, :, None] == image[:, None]) & (image[:, :, None] >= 0) & bidirectional
    return ((same_document & ((query >= key) | same_image)) | (query == key))[:, None]


def block_mask(document: Tensor, image: Tensor, bidirectional: bool = True) -> BlockMask:
    """The same rule for FlexAttention; the arguments are those of `dense_mask`."""
    if not bidirectional:
        image = torch.full_like(image, -1)

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = (document[b, query] == document[b, key]) & (document[b, query] >= 0)
        same_image = (image[b, query] == image[b, key]) & (image[b, query] >= 0)
        return (same_document & ((query >= key) | same_image)) | (query == key)

    b, t = document.shape
    return create_block_mask(rule, b, None, t, t, device=document.device, BLOCK_SIZE=BLOCK)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q [B, H, T, E] over k, v [B, K, S, E] -> [B, H, T, E], scaled by 1/sqrt(E). No forward mode."""
    if isinstance(mask, BlockMask):
        return _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as products and a softmax: a form that has a derivative in forward mode."""
    b, h, t, e = q.shape
    grouped = q.reshape(b, k.shape[1], -1, t, e)
    scores = grouped @ k[:, :, None].transpose(-1, -2) * e**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    return (scores.softmax(-1) @ v[:, :, None]).reshape(b, h, t, e)


@cache
def _flex(device: str) -> Any:
    """FlexAttention, compiled where that gives the fused kernel; eager on a CPU, whose compiled form cannot train."""
    return torch.compile(flex_attention) if device == "cuda" else flex_attention
