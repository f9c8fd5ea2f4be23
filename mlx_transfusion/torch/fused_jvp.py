"""Fused attention with a derivative in forward mode, on CUDA: the package jvp-flash-attention, fitted to our shapes.

Its kernel gives the output and its tangent in one pass and keeps no scores, only a mask of one byte a pair and head.
It takes as many queries as keys, as many heads of each, an even length from 32 on, and a few widths of heads. A
picture behind its prefix has more keys than queries, so queries are filled up at the front with zeros that see
themselves alone and are cut off again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.attention import Attend, written_out

SHORTEST = 32
"""Positions that the kernel takes at least."""
WIDTHS = (16, 32, 64, 128, 256)
"""Widths of a head that it takes."""


def forward_mode_attention(how: str, device: torch.device, head_dim: int) -> Attend:
    """The attention of a pass that is differentiated in forward mode: "plain" (written out) or "flash" (fused).

    Raises UserError for "flash" on another device than CUDA, without the package, or for other widths of a head.
    """
    if how == "plain":
        return written_out
    if device.type != "cuda":
        raise UserError("--jvp-attention flash runs on CUDA alone: use plain here")
    if head_dim not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        raise UserError(
            f"--jvp-attention flash: heads are {head_dim} wide, expected one of {widths}: use plain"
        )
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError as error:
        raise UserError(
            "--jvp-attention flash needs jvp-flash-attention: pip install 'mlx-transfusion[jvp]'"
        ) from error
    return partial(square, JVPAttn.fwd_dual)


def square(kernel: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, T, E] over k, v [B, K, S, E] with a mask [B, 1, T or 1, S] -> [B, H, T, E], by a kernel for squares.

    kernel(q, k, v, attn_mask=..., verify_attn_mask=...) takes three tensors [B, H, N, E] and a mask [B, H, N, N].
    """
    b, heads, t, _ = q.shape
    s, groups = k.shape[2], heads // k.shape[1]
    n = max(SHORTEST, s + s % 2)
    k, v = (F.pad(x.repeat_interleave(groups, 1), (0, 0, n - s, 0)) for x in (k, v))
    whole = torch.eye(n, dtype=torch.bool, device=q.device).repeat(b, 1, 1, 1)
    whole[:, :, n - t :, : n - s] = False
    whole[:, :, n - t :, n - s :] = mask.expand(b, 1, t, s)
    q = F.pad(q, (0, 0, n - t, 0))
    # Every row sees something by construction: no need to wait for a check of the mask.
    out = kernel(q, k, v, attn_mask=whole.expand(b, heads, n, n), verify_attn_mask=False)
    return out[:, :, n - t :]
