"""One step of the autoencoder's training: the loss, both gradients, both optimisers. Compiled once for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.autoencoder.bottleneck import Passage, code_passage, follow, normal_passage
from mlx_transfusion.autoencoder.config import AutoencoderTraining
from mlx_transfusion.autoencoder.discriminator import Discriminator, hinge_loss
from mlx_transfusion.autoencoder.perceptual import Distance
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.training.optimizer import ema_update, make_optimizer, set_learning_rate

Tree = Any
AUTOENCODER, DISCRIMINATOR, USAGE = "autoencoder", "discriminator", "usage"
TERMS = ("l1", "perceptual", "identity", "adversarial", "discriminator")
"""What every step reports, beside what its bottleneck has."""


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
    """The functions of one run. weights: {"autoencoder": tree, "discriminator": tree}, and "usage" of a codebook."""

    def __init__(
        self,
        model: AutoencoderKL | AutoencoderVQ,
        discriminator: Discriminator,
        optimizers: Optimizers,
        config: AutoencoderTraining,
        perceptual: Distance | None,
        identity: Distance | None,
    ) -> None:
        """perceptual, identity: None where the loss has no such term."""
        self._model, self._discriminator, self._optimizers = model, discriminator, optimizers
        self._config, self._perceptual, self._identity = config, perceptual, identity
        self._compiled: dict[bool, Callable[..., Any]] = {}

    def __call__(
        self, weights: Tree, ema: Tree, pixels: mx.array, draws: mx.array, decay: float, adversarial: bool
    ) -> tuple[Tree, Tree, dict[str, mx.array]]:
        """Pixels [B, H, W, 3] in [-1, 1], `bottleneck.draws` -> weights, ema, and the loss's terms by their names.

        Terms that are not in use are 0; those of the other kind of bottleneck are not there.
        """
        if adversarial not in self._compiled:
            run = partial(self._run, adversarial=adversarial)
            state = self._optimizers.state
            self._compiled[adversarial] = (
                mx.compile(run, inputs=state, outputs=state) if self._config.compile else run
            )
        return self._compiled[adversarial](weights, ema, pixels, draws, mx.array(decay))

    def _run(
        self,
        weights: Tree,
        ema: Tree,
        pixels: mx.array,
        draws: mx.array,
        decay: mx.array,
        *,
        adversarial: bool,
    ) -> tuple[Tree, Tree, dict[str, mx.array]]:
        judge = weights[DISCRIMINATOR] if adversarial else None
        (_, (terms, decoded, passage)), gradients = mx.value_and_grad(self._loss)(
            weights[AUTOENCODER], pixels, draws, judge
        )
        new, ema, terms["gradient_norm"] = self._update(weights[AUTOENCODER], ema, gradients, decay)
        weights = weights | {AUTOENCODER: new}
        if USAGE in weights:
            new, ema, usage, more = follow(new, ema, weights[USAGE], passage, draws, self._config.codebook)
            weights, terms = weights | {AUTOENCODER: new, USAGE: usage}, terms | more
        if judge is not None:
            weights[DISCRIMINATOR], terms["discriminator"] = self._judge(judge, pixels, decoded)
        return weights, ema, terms

    def _judge(self, judge: Tree, pixels: mx.array, decoded: mx.array) -> tuple[Tree, mx.array]:
        """One step of the discriminator: its new weights and its loss."""

        def loss(w: Tree) -> mx.array:
            self._discriminator.update(w)
            return hinge_loss(self._discriminator(pixels), self._discriminator(mx.stop_gradient(decoded)))

        value, gradients = mx.value_and_grad(loss)(judge)
        self._discriminator.update(judge)
        return self._optimizers.discriminator.apply_gradients(_ordered(gradients), judge), value

    def _loss(
        self, weights: Tree, pixels: mx.array, draws: mx.array, judge: Tree | None
    ) -> tuple[mx.array, tuple[dict[str, mx.array], mx.array, Passage]]:
        """The autoencoder's loss, its terms, the decoded pictures, and what passed the bottleneck."""
        c = self._config.loss
        self._model.update(weights)
        passage = self._pass(pixels, draws)
        decoded = self._model.decode(passage.z)
        terms = {name: mx.array(0.0) for name in TERMS}
        terms["l1"] = mx.abs(decoded - pixels).mean()
        if self._perceptual is not None:
            terms["perceptual"] = self._perceptual(decoded, pixels)
        if self._identity is not None:
            terms["identity"] = self._identity(decoded, pixels)
        if judge is not None:
            self._discriminator.update(judge)
            terms["adversarial"] = -self._discriminator(decoded).mean()
        total = (
            terms["l1"]
            + c.perceptual * terms["perceptual"]
            + c.identity * terms["identity"]
            + c.gan * terms["adversarial"]
            + passage.loss
        )
        return total, (terms | passage.terms, decoded, passage)

    def _pass(self, pixels: mx.array, draws: mx.array) -> Passage:
        if isinstance(self._model, AutoencoderVQ):
            return code_passage(self._model, pixels, self._config.codebook)
        return normal_passage(self._model, pixels, draws, self._config.loss.kl)

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
