"""Several processes under `mlx.launch`: which of them writes, and where they wait for each other."""

from __future__ import annotations

import mlx.core as mx


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return mx.distributed.init().rank() == 0


def wait_for_all() -> None:
    """Return when every process has come here, so that nobody runs ahead of a file."""
    if mx.distributed.init().size() > 1:
        mx.eval(mx.distributed.all_sum(mx.zeros((1,))))
