"""How much freed memory MLX keeps for reuse."""

from __future__ import annotations

from mlx_transfusion.errors import UserError

MOST = 1 << 62
"""Bytes: no limit."""


def limit_cache(gigabytes: float | None) -> None:
    """Let MLX keep at most so many GB (10^9 bytes) of freed memory; None leaves MLX's own limit.

    MLX's own is 32 MiB on a CPU. Raises UserError for a number below 0, and for one that is none.
    """
    if gigabytes is None:
        return
    if not gigabytes >= 0:
        raise UserError(f"--cache-limit is {gigabytes:g} GB, expected 0 or more")
    import mlx.core as mx

    mx.set_cache_limit(int(min(gigabytes * 1e9, MOST)))
