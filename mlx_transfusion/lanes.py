"""Several CPU cores for one pass: rows of a batch run beside each other, each lane on a stream of its own.

MLX computes everything but matrix products on one core, and a BLAS splits products as small as ours badly. Rows of a
batch never meet inside the decoder, so half of them can run on one core and half on another, products, softmax and
gates alike. While lanes are open the BLAS works with one thread a lane.

The number of threads that the BLAS was allowed (OPENBLAS_NUM_THREADS and its kin) is the number of lanes. On a GPU,
and where no BLAS can be told its threads, everything stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import mlx.core as mx

from mlx_transfusion import blas

MIN_TOKENS = 16
"""Of a lane: fewer are not worth the second graph."""


class _Streams(threading.local):
    """Streams belong to the thread that made them."""

    def __init__(self) -> None:
        self.all: list[mx.Stream] = []
        self.open = 1

    def first(self, count: int) -> list[mx.Stream]:
        while len(self.all) < count - 1:
            self.all.append(mx.new_stream(mx.cpu))
        return [mx.default_stream(mx.cpu), *self.all[: count - 1]]


_streams = _Streams()


@contextmanager
def lanes(rows: int) -> Iterator[None]:
    """Inside, passes over a batch of up to `rows` rows use several cores. What they give must be evaluated inside.

    The thread count of the BLAS belongs to the whole process: other threads' products have one thread meanwhile.
    """
    threads = blas.threads() if mx.default_device().type == mx.cpu else None
    count = min(rows, threads or 1)
    if count == 1 or _streams.open > 1:
        yield
        return
    _streams.open = count
    blas.set_threads(1)
    try:
        yield
    finally:
        blas.set_threads(threads or 1)
        _streams.open = 1


def split(rows: int, tokens: int) -> list[tuple[mx.Stream, slice]]:
    """The streams and rows of the open lanes for a batch of `rows` rows of `tokens` tokens; [] for no split."""
    count = min(_streams.open, rows, rows * tokens // MIN_TOKENS)
    if count < 2:
        return []
    ends = [rows * i // count for i in range(count + 1)]
    return [(s, slice(ends[i], ends[i + 1])) for i, s in enumerate(_streams.first(count))]


def by_rows(function: Callable[..., mx.array], *arrays: mx.array) -> list[mx.array]:
    """What `function` gives of each open lane's rows of the arrays, or of all of them in one piece."""
    lanes = split(len(arrays[0]), 1)
    if not lanes:
        return [function(*arrays)]
    parts = []
    for stream, rows in lanes:
        with mx.stream(stream):
            parts.append(function(*(array[rows] for array in arrays)))
    return parts


class Shares:
    """Hands pieces of work of known size to the open lanes, each to the one that has least."""

    def __init__(self) -> None:
        self._streams = _streams.first(_streams.open) if _streams.open > 1 else []
        self._load = [0] * len(self._streams)

    def lane(self, size: int) -> AbstractContextManager[object]:
        """Inside, work of `size` (in any unit) is in its lane; where no lanes are open, it stays where it is."""
        if not self._streams:
            return nullcontext()
        lane = self._load.index(min(self._load))
        self._load[lane] += size
        return mx.stream(self._streams[lane])
