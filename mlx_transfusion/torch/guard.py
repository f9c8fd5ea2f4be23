"""Steps that are left out: losses or gradients that are not finite, or that jumped far above those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist

from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.parallel import World

WINDOW = 128
"""Steps that a jump is measured against; half of them have to be there before anything counts as one."""


class Guard:
    """Judges the steps of one run, in all processes alike; a checkpoint keeps `recent`."""

    def __init__(self, world: World, max_skipped: int, spike: float) -> None:
        """max_skipped: bad steps in a row that end the run. spike: standard deviations above the mean; 0: any."""
        self._world, self._max_skipped, self._spike = world, max_skipped, spike
        self._in_a_row = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    @property
    def recent(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of the last good steps, oldest first."""
        return list(self._recent)

    def restore(self, recent: Iterable[Iterable[float]]) -> None:
        """Go on from what a checkpoint kept."""
        self._recent.extend((loss, norm) for loss, norm in recent)

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm; bad in all processes when it is bad in one."""
        answer = [self._judge(loss, norm)]
        flag = torch.tensor(float(answer[0] is not None), device=self._world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag.item():
            return None
        return answer[0] or "another process found it bad"

    def accept(self, loss: float, norm: float) -> None:
        """The step was made."""
        self._in_a_row = 0
        if self._spike:
            self._recent.append((loss, norm))

    def skip(self, step: int, fault: str) -> str:
        """The step was left out: a line about it. Raises UserError when it is one too many in a row."""
        self._in_a_row += 1
        if self._in_a_row >= self._max_skipped:
            raise UserError(
                f"step {step}: {fault}, for {self._in_a_row} steps in a row; training stopped, the last checkpoint "
                "is good; start a new run from it (init) with a lower learning rate"
            )
        return f"step {step}: {fault}: skipped"

    def _judge(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"not finite (loss {loss}, gradient norm {norm})"
        if not self._spike or len(self._recent) < WINDOW // 2:
            return None
        for name, value, before in zip(
            ("loss", "gradient norm"), (loss, norm), zip(*self._recent, strict=True), strict=True
        ):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if value > mean + self._spike * deviation:
                return f"{name} {value:.4g} jumped (mean {mean:.4g}, deviation {deviation:.2g})"
        return None
