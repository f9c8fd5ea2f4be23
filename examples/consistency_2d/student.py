"""A small network F(x, angle) and its training as a consistency model, good choices and bad ones alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import ring

from mlx_transfusion import consistency, noise, trigflow
from mlx_transfusion.models.gates import silu
from mlx_transfusion.pace import tangent_warmup

BATCH = 256
LEARNING_RATE = 2e-3
PROPOSAL = (-0.3, 1.4)
"""Mean and standard deviation of log tan(angle): the paper's (-1, 1.4) moved from sigma_d = 0.5 to 1."""
MIDDLE = 1.1
"""Where two-step samples are noised again."""


@dataclass(frozen=True)
class Experiment:
    """One training run. What differs from the defaults is what the run is about."""

    name: str
    method: str = "scd"
    """"scd" learns along the teacher's velocity, "sct" along that of each sample."""
    tangent: str = "normalize"
    constant: float = consistency.TANGENT_CONSTANT
    """What is done to the tangent, and with which c: as in `consistency.rescale`."""
    warmup: float = 0.1
    """Share of the run over which the tangent's second term is faded in."""
    weight: bool = False
    """Learn the weight w(angle) of the loss. Off: the README tells what it does to this data."""
    embedding: str = "positional"
    """"positional" (frequencies up to 1), "fourier" (random, scale 16), or "log_tan" (of log tan(angle))."""


class Student(nn.Module):
    """Points and an embedded angle, through three hidden layers."""

    def __init__(self, embedding: str, width: int = 96, frequencies: int = 8) -> None:
        super().__init__()
        self._embedding = embedding
        self._frequencies = 16.0 ** -mx.linspace(0, 1, frequencies)
        if embedding == "fourier":
            self._frequencies = mx.array(noise.normal(0, 0, frequencies, "ring/fourier")) * 16 * 2 * math.pi
        sizes = [2 + 2 * frequencies, width, width, width]
        self.hidden = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.out = nn.Linear(width, 2)

    def __call__(self, x: mx.array, angle: mx.array) -> mx.array:
        """States [M, 2] at angles [M] -> F [M, 2]."""
        if self._embedding == "log_tan":  # clipped where the paper's sampler starts, and at its mirror image
            angle = mx.log(mx.tan(mx.clip(angle, math.atan(1 / 80), math.atan(80))))
        turn = angle[:, None] * self._frequencies
        h = mx.concatenate([x, mx.cos(turn), mx.sin(turn)], 1)
        for layer in self.hidden:
            h = silu(layer(h))
        return self.out(h)


class Trained(nn.Module):
    """What the optimiser sees: the student and the loss weight beside it."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.student = Student(experiment.embedding)
        self.weight = consistency.LossWeight()
        self._weighted = experiment.weight

    def log_weight(self, angle: mx.array) -> mx.array:
        """w of angles [M]; zeros where it is switched off."""
        return self.weight(angle) if self._weighted else mx.zeros_like(angle)


def draw(step: int) -> tuple[mx.array, mx.array, mx.array]:
    """Data [BATCH, 2], noise [BATCH, 2] and angles [BATCH] of one step: the same for every experiment."""
    z = noise.normal(0, step, (BATCH, 2), "ring/noise")
    tau = PROPOSAL[0] + PROPOSAL[1] * noise.normal(0, step, BATCH, "ring/angle")
    return mx.array(ring.sample(BATCH, step)), mx.array(z), mx.array(np.arctan(np.exp(tau)))


def losses(
    model: Trained, experiment: Experiment, x0: mx.array, z: mx.array, angle: mx.array, warmup: mx.array
) -> tuple[mx.array, mx.array]:
    """The loss, and the size of each raw tangent [M]."""
    a = angle[:, None]
    x = trigflow.mix(x0, z, a)
    v = ring.velocity(x, angle) if experiment.method == "scd" else trigflow.velocity_target(x0, z, a)
    cos_velocity = mx.cos(a) * v
    value = consistency.value_and_derivative(model.student, x, angle, cos_velocity)
    raw = consistency.tangent(value, x, angle, cos_velocity, warmup)
    g = consistency.rescale(raw, experiment.tangent, experiment.constant)
    loss = consistency.image_losses(value.network, g, model.log_weight(angle)).mean()
    return loss, mx.stop_gradient(consistency.rms(raw))


def train(
    experiment: Experiment, steps: int, watch: Callable[[int, Student], None]
) -> tuple[Student, np.ndarray]:
    """Train from scratch for `steps`; `watch(step, student)` is called after every tenth of the run.

    Returns the student and, for each step, the gradient's norm and the median and largest size of the raw
    tangents: [steps, 3].
    """
    mx.random.seed(0)
    model = Trained(experiment)
    rate = optim.cosine_decay(LEARNING_RATE, steps)
    optimizer = optim.Adam(rate, betas=[0.9, 0.99], bias_correction=True)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(x0: mx.array, z: mx.array, angle: mx.array, warmup: mx.array) -> mx.array:
        both = nn.value_and_grad(model, lambda m: losses(m, experiment, x0, z, angle, warmup))
        (_, sizes), gradients = both(model)
        gradients, norm = optim.clip_grad_norm(gradients, math.inf)
        optimizer.update(model, gradients)
        return mx.stack([norm, mx.median(sizes), sizes.max()])

    signals = []
    for step in range(steps):
        r = tangent_warmup(step, round(experiment.warmup * steps))
        signals.append(update(*draw(step), mx.array(r)))
        mx.eval(state, signals[-1])
        if (step + 1) % max(1, steps // 10) == 0:
            watch(step + 1, model.student)
    return model.student, np.array(mx.stack(signals))


def paint(student: Student, z: mx.array, fresh: mx.array | None = None) -> mx.array:
    """Samples [M, 2] from noise z [M, 2]: one step, or two with `fresh` noise [M, 2] at the middle angle."""

    def jump(x: mx.array, angle: float) -> mx.array:
        return trigflow.x0_from_velocity(x, student(x, mx.full((len(x),), angle)), angle)

    x0 = jump(z, trigflow.NOISE_ANGLE)
    return x0 if fresh is None else jump(trigflow.mix(x0, fresh, MIDDLE), MIDDLE)
