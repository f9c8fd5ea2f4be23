"""One step of the autoencoder's training: the loss, both gradients, both optimisers. Compiled once for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.autoencoder.config import AutoencoderTraining
from mlx_transfusion.autoencoder.discriminator import Discriminator, hinge_loss
from mlx_transfusion.autoencoder.perceptual import Perceptual
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.training.optimizer import ema_update, make_optimizer, set_learning_rate

Tree = Any
AUTOENCODER, DISCRIMINATOR = "autoencoder", "discriminator"
TERMS = ("l1", "perceptual", "identity", "kl", "adversarial", "discriminator")
"""What a step reports, in this order; those that are not in use are 0."""


class Optimizers:
    """AdamW of the autoencoder and of its adversary, with one state."""

    def __init__(self, config: AutoencoderTraining) -> None:
        self._config = config
        o = config.optimizer
        self.autoencoder = make_optimizer(o)
        self.discriminator = optim.AdamW(
            config.discriminator.learning_rate, list(o.betas), o.eps, 0.0, bias_correction=True
        )

    def init(self, weights: Tree) -> None:
        """Fresh states for such weights."""
        self.autoencoder.init(weights[AUTOENCODER])
        self.discriminator.init(weights[DISCRIMINATOR])

    @property
    def state(self) -> Tree:
        """Both states as one tree."""
        return {AUTOENCODER: self.autoencoder.state, DISCRIMINATOR: self.discriminator.state}

    @state.setter
    def state(self, state: Tree) -> None:
        self.autoencoder.state = state[AUTOENCODER]
        self.discriminator.state = state[DISCRIMINATOR]

    def set_factor(self, factor: float) -> None:
        """Learning rates as a part of their peaks."""
        set_learning_rate(self.autoencoder, self._config.optimizer, factor)
        self.discriminator.learning_rate = self._config.discriminator.learning_rate * factor


class Step:
    """The functions of one run. weights: {"autoencoder": tree, "discriminator": tree}."""

    def __init__(
        self,
        model: AutoencoderKL,
        discriminator: Discriminator,
        optimizers: Optimizers,
        config: AutoencoderTraining,
        perceptual: Perceptual | None,
    ) -> None:
        self._model, self._discriminator, self._optimizers = model, discriminator, optimizers
        self._config, self._perceptual = config, perceptual
        self._compiled: dict[bool, Callable[..., Any]] = {}

    def __call__(
        self, weights: Tree, ema: Tree, pixels: mx.array, eps: mx.array, decay: float, adversarial: bool
    ) -> tuple[Tree, Tree, mx.array, mx.array]:
        """Pixels [B, H, W, 3] in [-1, 1], noise [B, h, w, C] -> weights, ema, TERMS [6], norm of the gradient."""
        if adversarial not in self._compiled:
            run = self._with_adversary if adversarial else self._without
            state = self._optimizers.state
            self._compiled[adversarial] = (
                mx.compile(run, inputs=state, outputs=state) if self._config.compile else run
            )
        return self._compiled[adversarial](weights, ema, pixels, eps, mx.array(decay))

    def _without(
        self, weights: Tree, ema: Tree, pixels: mx.array, eps: mx.array, decay: mx.array
    ) -> tuple[Tree, Tree, mx.array, mx.array]:
        (_, (terms, _)), gradients = mx.value_and_grad(self._loss)(weights[AUTOENCODER], pixels, eps, None)
        new, ema, norm = self._update(weights[AUTOENCODER], ema, gradients, decay)
        return weights | {AUTOENCODER: new}, ema, terms, norm

    def _with_adversary(
        self, weights: Tree, ema: Tree, pixels: mx.array, eps: mx.array, decay: mx.array
    ) -> tuple[Tree, Tree, mx.array, mx.array]:
        judge = weights[DISCRIMINATOR]
        (_, (terms, decoded)), gradients = mx.value_and_grad(self._loss)(
            weights[AUTOENCODER], pixels, eps, judge
        )
        new, ema, norm = self._update(weights[AUTOENCODER], ema, gradients, decay)

        def loss(w: Tree) -> mx.array:
            self._discriminator.update(w)
            return hinge_loss(self._discriminator(pixels), self._discriminator(mx.stop_gradient(decoded)))

        value, gradients = mx.value_and_grad(loss)(judge)
        self._discriminator.update(judge)
        judge = self._optimizers.discriminator.apply_gradients(_ordered(gradients), judge)
        terms = mx.concatenate([terms[:-1], value[None]])
        return {AUTOENCODER: new, DISCRIMINATOR: judge}, ema, terms, norm

    def _loss(
        self, weights: Tree, pixels: mx.array, eps: mx.array, judge: Tree | None
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """The autoencoder's loss, its TERMS, and the decoded pictures."""
        c = self._config.loss
        self._model.update(weights)
        moments = self._model.encode(pixels)
        decoded = self._model.decode(moments.sample(eps))
        l1 = mx.abs(decoded - pixels).mean()
        divergence = moments.kl().sum() / pixels.size
        zero = mx.array(0.0)
        perceptual = identity = zero
        if self._perceptual is not None and c.perceptual:
            perceptual = self._perceptual(decoded, pixels)
        if self._perceptual is not None and c.identity:
            identity = self._perceptual.identity(decoded, pixels)
        adversarial = zero
        if judge is not None:
            self._discriminator.update(judge)
            adversarial = -self._discriminator(decoded).mean()
        total = (
            l1 + c.perceptual * perceptual + c.identity * identity + c.kl * divergence + c.gan * adversarial
        )
        return total, (mx.stack([l1, perceptual, identity, divergence, adversarial, zero]), decoded)

    def _update(
        self, weights: Tree, ema: Tree, gradients: Tree, decay: mx.array
    ) -> tuple[Tree, Tree, mx.array]:
        self._model.update(weights)  # leave no tracers behind
        limit = self._config.optimizer.clip
        gradients, norm = optim.clip_grad_norm(_ordered(gradients), limit if limit > 0 else math.inf)
        weights = self._optimizers.autoencoder.apply_gradients(gradients, weights)
        return weights, ema_update(ema, weights, decay), norm


def _ordered(tree: Tree) -> Tree:
    """By name: the order of a tree changes with a resume, and with it the last bit of a norm."""
    return tree_unflatten(sorted(dict(tree_flatten(tree)).items()))
