"""What one process trains on, step by step, read ahead by a thread or by processes.

A step's documents are a function of (seed, step), and a process's are its share of them. So the state of this loader
is the number of the step: it goes on from any step, on any number of processes, and no row is repeated or left out.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.step import Step
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.shard_set import ShardSet

AHEAD = 2
"""Steps that each process of a loader keeps ready."""


@dataclass(frozen=True)
class Loaded:
    """One step's share of this process, cut into parts, with the totals of the whole step."""

    parts: list[Any]
    text_total: int
    image_total: int
    tokens: int
    flops: float
    """Operations that these documents need (`flops.step_flops`); 0 where they are not counted."""


class Loader(Dataset):
    """The shares of process `rank` of `size`, by step; whoever reads them needs no device."""

    def __init__(
        self, data: DataSet | ShardSet, step: Step, config: TrainConfig, rank: int, size: int
    ) -> None:
        self.data, self.step, self.config, self.rank, self.size = data, step, config, rank, size

    def load(self, step: int) -> Loaded:
        """Read this process's documents of a step (numpy only). Raises UserError for what cannot be read."""
        c = self.config
        documents: Sequence[Any] = self.data.documents(step, c.batch_size, step / max(1, c.steps - 1))
        totals = [self.step.count(self.data, d) for d in documents]
        parts = [
            self.step.load(self.data, documents[self.rank + part * self.size :: self.size * c.accumulate])
            for part in range(c.accumulate)
        ]
        return Loaded(
            parts,
            sum(t for t, _ in totals),
            sum(i for _, i in totals),
            sum(b.tokens for b in parts),
            sum(self.step.flops(b) for b in parts),
        )

    def __getitem__(self, step: int) -> Loaded | UserError:
        """As `load`, in a process of its own: an error is handed over, not raised."""
        try:
            return self.load(step)
        except UserError as error:
            return error

    def steps(self, first: int, workers: int = 0) -> Iterator[Loaded]:
        """The shares from step `first` to the last step of the run, in order.

        workers: processes that read ahead; 0 reads one step ahead in a thread. Raises UserError as `load` does, and
        when one of these processes was killed.
        """
        return self._processes(first, workers) if workers else self._thread(first)

    def _thread(self, first: int) -> Iterator[Loaded]:
        last = self.config.steps
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Loaded] | None = pool.submit(self.load, first) if first < last else None
            for n in range(first, last):
                assert ahead is not None
                loaded = ahead.result()
                ahead = pool.submit(self.load, n + 1) if n + 1 < last else None
                yield loaded

    def _processes(self, first: int, workers: int) -> Iterator[Loaded]:
        # Forked, so that the rows read at the start are shared memory, and nothing has to be pickled to get there.
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, self.config.steps),
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork",
        )
        try:
            for loaded in loader:
                if isinstance(loaded, UserError):
                    raise loaded
                yield loaded
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads data is gone ({str(error).splitlines()[0]}): start again to go on from the "
                "last checkpoint; if memory ran out, use fewer of them (--workers)"
            ) from error


def _as_it_is(loaded: Any) -> Any:
    """In the place of PyTorch's own function, which would turn arrays into tensors."""
    return loaded


def _ignore_signals(worker: int) -> None:
    """A Ctrl-C or SIGTERM for the whole group lets training end its step, and it needs its data to do so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
