"""The autoencoder's training loop: from its config to checkpoints that every verb reads.

A batch and its noise are functions of (seed, step), so a checkpoint of weights, optimisers and step resumes exactly.
One process.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_transfusion.autoencoder.bottleneck import codebook_from, draws, quantized_start, start_usage
from mlx_transfusion.autoencoder.config import AutoencoderTraining
from mlx_transfusion.autoencoder.discriminator import GROUPS, Discriminator
from mlx_transfusion.autoencoder.folder import load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.measures import measure
from mlx_transfusion.autoencoder.perceptual import Distance, Perceptual, load_lpips
from mlx_transfusion.autoencoder.pictures import Pictures, to_signed
from mlx_transfusion.autoencoder.preview import fit_preview
from mlx_transfusion.autoencoder.step import AUTOENCODER, DISCRIMINATOR, USAGE, Optimizers, Step
from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ, build_autoencoder
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.interrupt import Interrupt
from mlx_transfusion.training.metrics import MetricsLog
from mlx_transfusion.training.progress import Progress
from mlx_transfusion.training.same_run import check_same_run
from mlx_transfusion.training.schedule import ema_decay, learning_rate_factor

START_LOGVAR = -6.0


class Trainer:
    """Owns the state of one run; `run` trains it to the end."""

    def __init__(self, config: AutoencoderTraining) -> None:
        """Builds model, data and optimisers. Raises UserError for bad config or data."""
        self.config, self.output = config, Path(config.output)
        self.train = Pictures(config.data.train, config.data, seed=config.seed)
        self.valid = Pictures(config.data.valid, config.data, stream="valid") if config.data.valid else None
        if config.discriminator.channels % GROUPS:
            raise UserError(
                f"training config: discriminator.channels is {config.discriminator.channels}, expected a multiple of "
                f"{GROUPS}"
            )
        mx.random.seed(config.seed)
        self.model = build_autoencoder(config.model)
        if isinstance(self.model, AutoencoderKL):
            quieten(self.model)
        d = config.discriminator
        self.discriminator = Discriminator(config.model.in_channels, d.channels, d.layers)
        if not ckpt.checkpoints(self.output / "checkpoints"):
            self._start()
        self._perceptual, self._identity = _distances(config)
        self.optimizers = Optimizers(config)
        weights = {AUTOENCODER: self.model.parameters(), DISCRIMINATOR: self.discriminator.parameters()}
        if isinstance(self.model, AutoencoderVQ):
            side = config.data.size // config.model.factor
            weights[USAGE] = start_usage(self.model, config.batch_size * side**2)
        mx.eval(weights)
        self.optimizers.init(weights)
        self.state = ckpt.TrainState(0, weights, tree_map(lambda w: w, weights[AUTOENCODER]))
        self.step = self._new_step()

    def _start(self) -> None:
        """Weights to start from, and a codebook of elements that the encoder gives for training pictures."""
        begin = None if self.config.init is None else self._read_start(self.config.init)
        if isinstance(self.model, AutoencoderVQ) and not isinstance(begin, AutoencoderVQ):
            if begin is not None:
                quantized_start(self.model, begin)
            elements = np.concatenate(
                [
                    np.array(self.model.encoded(mx.array(to_signed(part)))).reshape(
                        -1, self.config.model.latent_channels
                    )
                    for part in self.train.first(self.config.scale_pictures, 16)
                ]
            )
            self.model.quantizer.codebook = codebook_from(
                elements, self.model.codebook_size, self.config.seed
            )
        elif begin is not None:
            self.model.update(begin.parameters())

    def _read_start(self, folder: str) -> AutoencoderKL | AutoencoderVQ:
        """The autoencoder in `init`; raises UserError when it is of other sizes. A codebook may start from KL."""
        begin = load_autoencoder(folder)
        free = ["scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size"]
        if begin.config.quantizer is None:
            free.append("quantizer")
        ours, theirs = self.config.model.to_dict(), begin.config.to_dict()
        if differs := [key for key in ours if ours[key] != theirs[key] and key not in free]:
            raise UserError(
                f"init {folder}: its {differs[0]} is {theirs[differs[0]]}, [model] says {ours[differs[0]]}"
            )
        return begin.model

    def _new_step(self) -> Step:
        return Step(
            self.model, self.discriminator, self.optimizers, self.config, self._perceptual, self._identity
        )

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises UserError when it belongs to another run."""
        found = ckpt.checkpoints(self.output / "checkpoints")
        if not found:
            return False
        record = ckpt.read_record(found[-1])["config"]
        then = from_dict(AutoencoderTraining, record, f"{found[-1]}: the training config in it")
        check_same_run(then.to_dict(), self.config.to_dict(), found[-1], _MAY_CHANGE)
        self.state = ckpt.load_checkpoint(found[-1], self.optimizers)  # type: ignore[arg-type]  # has a state
        self.model.update(self.state.weights[AUTOENCODER])
        self.step = self._new_step()  # compiled over the restored state
        return True

    def run(self) -> Path:
        """Train to `config.steps`; returns the last checkpoint. Ctrl-C ends the step, saves, and is raised on."""
        for line in self.train.bad_rows[:20]:
            print(f"skipped: {line}", file=sys.stderr)
        log = MetricsLog(self.output, self.state.step)
        try:
            with (
                Progress(self.config.steps, self.state.step, True, _line) as progress,
                Interrupt() as interrupt,
            ):
                with ThreadPoolExecutor(1) as loader:
                    self._loop(loader, interrupt, progress, log)
                return self._save()
        finally:
            log.close()

    def _loop(
        self, loader: ThreadPoolExecutor, interrupt: Interrupt, progress: Progress, log: MetricsLog
    ) -> None:
        steps, size = self.config.steps, self.config.batch_size
        ahead: Future[np.ndarray] | None = None
        while self.state.step < steps:
            n = self.state.step
            pixels = ahead.result() if ahead else self.train.batch(n, size)
            ahead = loader.submit(self.train.batch, n + 1, size) if n + 1 < steps else None
            values = self._train_step(pixels)
            progress.advance(n + 1, values)
            if (n + 1) % self.config.log_every == 0:
                log.write(n + 1, values)
            self._after_step(progress, log)
            if interrupt.requested:
                self._save()
                raise KeyboardInterrupt

    def _train_step(self, pixels: np.ndarray) -> dict[str, float]:
        c, n = self.config, self.state.step
        start = time.perf_counter()
        factor = learning_rate_factor(n, c.steps, c.optimizer)
        self.optimizers.set_factor(factor)
        weights, ema, terms = self.step(
            self.state.weights,
            self.state.ema,
            mx.array(to_signed(pixels)),
            mx.array(draws(c, n, len(pixels))),
            ema_decay(n, c.ema),
            n >= c.loss.gan_start and c.loss.gan > 0,
        )
        mx.eval(weights, ema, terms, self.optimizers.state)
        values = {name: float(np.array(value)) for name, value in terms.items()}
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"step {n + 1}: not finite any more ({values}); training stopped, the last checkpoint is good; start "
                "a new run from it (init) with a lower learning rate"
            )
        self.state = ckpt.TrainState(n + 1, weights, ema)
        self.model.update(weights[AUTOENCODER])
        seconds = time.perf_counter() - start
        return values | {
            "learning_rate": c.optimizer.learning_rate * factor,
            "pictures_per_second": len(pixels) / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }

    def _after_step(self, progress: Progress, log: MetricsLog) -> None:
        c, n = self.config, self.state.step
        if self.valid is not None and c.valid_every and n % c.valid_every == 0:
            with self._averaged():
                found = measure(self.model, self.valid.first(c.valid_pictures))
            values = {f"valid_{name}": found[name] for name in ("psnr", "l1")}
            progress.note(f"step {n}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            log.write(n, values)
        if n % c.save_every == 0 and n < c.steps:
            self._save()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the EMA weights."""
        self.model.update(self.state.ema)
        try:
            yield
        finally:
            self.model.update(self.state.weights[AUTOENCODER])

    def _save(self) -> Path:
        def save(folder: Path, model: Any, tokenizer: Any, extra: Any) -> object:
            latents, pixels = self._first_latents()
            config = with_scale(
                dataclasses.replace(self.config.model, sample_size=self.config.data.size), latents
            )
            latents = (latents - config.shift_factor) * config.scaling_factor
            return save_autoencoder(folder, model, config, fit_preview(latents, pixels))

        return ckpt.save_checkpoint(
            self.output / "checkpoints",
            self.state,
            self.optimizers,  # type: ignore[arg-type]  # has a state
            self.model,  # type: ignore[arg-type]  # has parameters
            None,  # type: ignore[arg-type]
            {"config": self.config.to_dict()},
            self.config.keep,
            save=save,
        )

    def _first_latents(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of latents, not normalised, and pixels in [-1, 1], of some training pictures."""
        pixels = [to_signed(part) for part in self.train.first(self.config.scale_pictures, 16)]
        latents = [np.array(self.model.latents(mx.array(part))) for part in pixels]
        return np.concatenate(latents), np.concatenate(pixels)


def _distances(config: AutoencoderTraining) -> tuple[Distance | None, Distance | None]:
    """The perceptual and the identity loss, None where they have no weight. Raises UserError for missing weights."""
    c = config.loss
    network = Perceptual(config.data.size, c.perceptual_blocks) if c.needs_efficientnet else None
    perceptual: Distance | None = network
    if c.lpips is not None:
        perceptual = load_lpips(Path(c.lpips))
    identity = None if network is None else network.identity
    return perceptual if c.perceptual else None, identity if c.identity else None


def quieten(model: AutoencoderKL) -> None:
    """Let fresh weights give a small variance: theirs is about 1, and the decoder would first see noise alone."""
    last = model.quant_conv if model.config.use_quant_conv else model.encoder.conv_out
    channels = model.config.latent_channels
    last.bias = mx.where(mx.arange(2 * channels) < channels, last.bias, START_LOGVAR)


def with_scale(config: AutoencoderConfig, latents: np.ndarray) -> AutoencoderConfig:
    """The config with the shift and factor that give such latents [N, h, w, C] zero mean and unit variance."""
    std = float(latents.std(dtype=np.float64))
    return dataclasses.replace(
        config, shift_factor=float(latents.mean(dtype=np.float64)), scaling_factor=1 / max(std, 1e-6),
        latents_mean=None, latents_std=None,
    )  # fmt: skip


def train(config: AutoencoderTraining, resume: bool = True) -> Path:
    """Train as `config` says and return the last checkpoint's folder, which `load_autoencoder` reads.

    resume=True continues the run in `config.output` when it has checkpoints. With False such a folder is refused.
    Raises UserError for bad input, and when a loss is not finite any more.
    """
    trainer = Trainer(config)
    resumed = resume and trainer.resume()
    if not resumed and ckpt.checkpoints(trainer.output / "checkpoints"):
        raise UserError(
            f"{trainer.output}: holds checkpoints already; resume them (--resume) or choose another output"
        )
    return trainer.run()


def _line(values: dict[str, float]) -> str:
    codes = f"perplexity {values['perplexity']:.1f} " if "perplexity" in values else ""
    return (
        f"l1 {values['l1']:.4f} perceptual {values['perceptual']:.3f} adversarial {values['adversarial']:.3f} {codes}"
        f"{values['pictures_per_second']:.1f} pictures/s {values['peak_memory_gb']:.1f} GB"
    )


_MAY_CHANGE = re.compile(
    r"(output|init|loss\.lpips|log_every|valid_every|valid_pictures|save_every|keep|compile|scale_pictures)"
    r"|data\.(valid|threads|cache_gib|check_images|skip_bad_rows)\b.*|data\.train\.\d+\.(rows|images)"
)
"""Keys that may differ on resume without changing what is learned (files may have moved)."""
