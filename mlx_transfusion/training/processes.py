"""Several processes under `mlx.launch`: which of them writes, and where they wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_transfusion.errors import UserError


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return mx.distributed.init().rank() == 0


def wait_for_all() -> None:
    """Return when every process has come here, so that nobody runs ahead of a file. Raises UserError as `meeting`."""
    if mx.distributed.init().size() > 1:
        with meeting():
            mx.eval(mx.distributed.all_sum(mx.zeros((1,))))


@contextmanager
def meeting() -> Iterator[None]:
    """Around what needs all processes. Raises UserError when one of them has gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run has ended ({error}): see what it said; the last checkpoint is good, and "
            "the same command goes on from it"
        ) from error
