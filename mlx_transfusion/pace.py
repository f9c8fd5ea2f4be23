"""How sCM and ECT move over a run, in plain numbers: the same for MLX and PyTorch."""

from __future__ import annotations

STRETCH = 8.0
"""k of ECT: at small angles the gap is up to 1 + k/2 times that at large ones (the paper's value)."""
DECAY = 0.5
"""b of ECT per unit of tan(a). The paper's 1 counts in pixels of standard deviation 0.5."""


def tangent_warmup(step: int, steps: int) -> float:
    """The factor r of sCM's tangent at `step` (0-based): it rises evenly to 1 over `steps`; 0 steps switch it off.

    arXiv 2410.11081, section 4.2.
    """
    return 1.0 if steps <= 0 else min(1.0, step / steps)


def stage_gap(step: int, steps: int, stages: int, factor: float) -> float:
    """ECT's gap at large angles, factor^-(stage + 1), at `step` (0-based) of `steps`, cut into `stages` equal parts.

    arXiv 2406.14548, section 3.
    """
    stage = min(stages - 1, step * stages // max(1, steps))
    return factor ** -(stage + 1.0)
