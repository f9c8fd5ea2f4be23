"""What changes with the step: the learning rate, and how long the average of the weights remembers. No mlx."""

from __future__ import annotations

import math

from mlx_transfusion.training.config import OptimizerConfig


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor of the peak rate at `step` (0-based): linear warm-up to 1, then a cosine to `final_fraction`.

    The first step already moves (1/warmup), step `warmup` has the peak, the last step the final fraction
    (arXiv 2408.11039, section 4.1: 4,000 steps up, cosine down to 5%).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.final_fraction + (1 - config.final_fraction) * cosine


def ema_decay(step: int, decay: float) -> float:
    """Decay at `step`: it starts low, so that the random first weights are forgotten ((1 + n) / (10 + n))."""
    return min(decay, (1 + step) / (10 + step))
