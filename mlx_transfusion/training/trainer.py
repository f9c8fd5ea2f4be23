"""The training loop: one path from a TrainConfig to checkpoints, metrics and sample grids.

Runs on one process, or on several under `mlx.launch` (data parallel: every process takes its share of each
batch's documents, gradients are summed, and all hold the same weights).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transfusion.cache_limit import limit_cache
from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.lanes import lanes
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.best import Best, write_best
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.consistency_step import ConsistencyStep
from mlx_transfusion.training.discrete_data import CodeData
from mlx_transfusion.training.discrete_step import DiscreteStep
from mlx_transfusion.training.family_data import FamilyData
from mlx_transfusion.training.family_step import FamilyStep
from mlx_transfusion.training.interrupt import Interrupt
from mlx_transfusion.training.metrics import MetricsLog
from mlx_transfusion.training.optimizer import make_optimizer, set_learning_rate
from mlx_transfusion.training.painter_data import PainterData
from mlx_transfusion.training.painter_step import PainterStep, painting_start
from mlx_transfusion.training.processes import meeting, wait_for_all
from mlx_transfusion.training.progress import Progress
from mlx_transfusion.training.same_run import check_same_run
from mlx_transfusion.training.schedule import ema_decay, learning_rate_factor
from mlx_transfusion.training.shape import data_arguments
from mlx_transfusion.training.shard_set import open_data
from mlx_transfusion.training.signals import Watch
from mlx_transfusion.training.start import (
    attach_autoencoder,
    base_of,
    check_latents,
    family_of,
    new_model,
    teacher_of,
)
from mlx_transfusion.training.step import Step


@dataclass(frozen=True)
class Loaded:
    """One step's share of this process, cut into parts, with the totals of the whole step."""

    parts: list[Any]
    text_total: int
    image_total: int
    tokens: int


class Trainer:
    """Owns the state of one run; `run` trains it to the end."""

    def __init__(self, config: TrainConfig) -> None:
        """Builds model, data and optimiser. Raises UserError for bad config or data."""
        limit_cache(config.cache_limit)
        self.config = config
        self.group = mx.distributed.init()
        if config.batch_size < self.group.size() * config.accumulate:
            raise UserError(
                f"batch_size {config.batch_size} is too small for {self.group.size()} processes with "
                f"{config.accumulate} parts each: every part needs a document"
            )
        self.output = Path(config.output)
        self.painting = painting_start(config)
        self.family = None if self.painting is not None else family_of(config)
        guest = self.painting or (self.family.loaded if self.family else None)
        self.tokenizer = Tokenizer.load(config.tokenizer) if guest is None else guest.tokenizer
        begun = bool(ckpt.checkpoints(self.output / "checkpoints"))
        self.base = None if self.family else base_of(config)
        self.model: Any
        if guest is not None:
            self.model = guest.model
        elif self.base is not None:
            self.model = self.base.loaded.transfusion
        else:
            self.model = new_model(config, self.tokenizer, None if begun else config.start)
        if guest is None:
            self.model.gradient_checkpointing = config.gradient_checkpointing
        shared = data_arguments(config, self.tokenizer)
        rows: Any = CodeData if isinstance(self.model, Discrete) else open_data
        if self.painting is not None:
            rows, shared["config"] = PainterData, self.model.config
        elif self.family is not None:
            rows, shared["family"] = FamilyData, self.model
        else:
            shared["model"] = self.model.config
        self.train_data: Any = rows(config.data.train, **shared)
        self.valid_data: Any = (
            rows(config.data.valid, stream="valid", **shared) if config.data.valid else None
        )
        if guest is None:
            attach_autoencoder(self.model, config, self.train_data)
        self._stage()
        self.optimizer = make_optimizer(config.optimizer)
        self.teacher = self.family.teacher if self.family else teacher_of(config, self.model.config)
        self.step = self._new_step()
        weights = self.step.initial_weights()
        self.optimizer.init(weights)
        self.state = ckpt.TrainState(0, weights, tree_map(lambda w: w, self.step.model_weights(weights)))
        self.watch = Watch()
        self.best = Best(config.best_by, config.patience)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.group.rank() == 0

    def _stage(self) -> None:
        """With `low_ram`: encode all pictures and give up what they alone need."""
        if self.family is not None:
            if self.config.low_ram and self.is_main:
                print("low_ram: encoding all pictures before the first step", file=sys.stderr)
            self.family.stage([one for one in (self.train_data, self.valid_data) if one is not None])
        elif self.config.low_ram:
            raise UserError(
                "training config: low_ram is for converted models, and every step of a "
                f"{self.model.config.model_type} model needs all of it: leave it out"
            )

    def _new_step(self) -> Step:
        if self.painting is not None:
            return PainterStep(self.model, self.optimizer, self.config)
        if self.family is not None:
            return FamilyStep(self.model, self.family, self.optimizer, self.config)
        if self.base is not None:
            from mlx_transfusion.finetune.step import AdapterStep

            return AdapterStep(self.base, self.optimizer, self.config)
        if isinstance(self.model, Discrete):
            return DiscreteStep(self.model, self.optimizer, self.config)
        if self.config.consistency is None:
            return Step(self.model, self.optimizer, self.config)
        teacher = self.teacher.transfusion if self.teacher else None
        return ConsistencyStep(self.model, self.optimizer, self.config, teacher)

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises UserError when it belongs to another run."""
        found = ckpt.checkpoints(self.output / "checkpoints")
        if not found:
            return False
        record = ckpt.read_record(found[-1])
        # A key that the record of an older version lacks counts as its default: what the run did then.
        then = from_dict(TrainConfig, record["config"], f"{found[-1]}: the training config in it")
        check_same_run(then.to_dict(), self.config.to_dict(), found[-1])
        if self.painting is None:
            check_latents(self.train_data, found[-1])
        state = ckpt.load_checkpoint(found[-1], self.optimizer, self.step.read_averaged)
        self.model.update(state.ema)  # with a painter this is more than what is trained
        trained = self.step.model_weights(state.weights)
        self.state = dataclasses.replace(state, ema={name: state.ema[name] for name in trained})
        self.model.update(self.step.model_weights(self.state.weights))
        self.best = self.best.restore(record.get("best"))
        self.step = self._new_step()  # compiled over the restored state
        return True

    def run(self) -> Path:
        """Train to `config.steps`; returns the last checkpoint.

        Ctrl-C ends the step in hand, saves, and is raised on; a second one is raised at once.
        """
        config, log = self.config, None
        if self.is_main:
            log = MetricsLog(self.output, self.state.step)
            self._report_bad_rows()
        try:
            with Progress(config.steps, self.state.step, self.is_main) as progress, Interrupt() as interrupt:
                rows = config.batch_size if self.step.uses_lanes else 1
                with ThreadPoolExecutor(1) as loader, lanes(rows):
                    self._loop(loader, interrupt, progress, log)
                return self._save()
        finally:
            if log is not None:
                log.close()

    def _loop(
        self, loader: ThreadPoolExecutor, interrupt: Interrupt, progress: Progress, log: MetricsLog | None
    ) -> None:
        steps = self.config.steps
        if self.state.step == 0 and self.config.start and self.config.sample.every and self.is_main:
            self._sample_grid()  # what it starts from, to compare with
        ahead: Future[Loaded] | None = None
        while self.state.step < steps and not self.best.stop:
            n = self.state.step
            start = time.perf_counter()
            loaded = ahead.result() if ahead else self._load(n)
            waited = time.perf_counter() - start
            ahead = loader.submit(self._load, n + 1) if n + 1 < steps else None
            stop = self._train_step(loaded, interrupt, progress, log, waited)
            self._after_step(progress, log)
            if stop:
                self._save()
                raise KeyboardInterrupt

    def _report_bad_rows(self) -> None:
        bad = self.train_data.bad_rows + (self.valid_data.bad_rows if self.valid_data else [])
        for line in bad[:20]:
            print(f"skipped: {line}", file=sys.stderr)
        if bad:
            print(f"skipped {len(bad)} bad rows in all", file=sys.stderr)

    def _load(self, step: int) -> Loaded:
        """Read this process's documents of a step (runs in a thread: numpy only)."""
        c = self.config
        documents = self.train_data.documents(step, c.batch_size, step / max(1, c.steps - 1))
        ranks = self.group.size()
        totals = [self.step.count(self.train_data, d) for d in documents]
        parts = []
        for part in range(c.accumulate):
            mine = documents[self.group.rank() + part * ranks :: ranks * c.accumulate]
            if mine:
                parts.append(self.step.load(self.train_data, mine))
        return Loaded(
            parts, sum(t for t, _ in totals), sum(i for _, i in totals), sum(b.tokens for b in parts)
        )

    def _train_step(
        self,
        loaded: Loaded,
        interrupt: Interrupt,
        progress: Progress,
        log: MetricsLog | None,
        waited: float,
    ) -> bool:
        """One optimiser step, after `waited` seconds for its data. Returns whether any process was asked to stop."""
        c, n = self.config, self.state.step
        start = time.perf_counter()
        gradients, sums, stop = self._gradients(loaded, interrupt, n)
        factor = learning_rate_factor(n, c.steps, c.optimizer)
        set_learning_rate(self.optimizer, c.optimizer, factor)
        weights, ema, norm = self.step.update(
            gradients, self.state.weights, self.state.ema, ema_decay(n, c.ema)
        )
        mx.eval(weights, ema, self.optimizer.state, norm)
        text, image = (float(x) for x in sums / np.maximum(1, [loaded.text_total, loaded.image_total]))
        gradient_norm = float(np.array(norm))
        self._observe(n + 1, {"image loss": image, "gradient norm": gradient_norm})
        if not all(map(math.isfinite, (text, image, gradient_norm))):
            raise UserError(
                f"step {n + 1}: not finite any more (text loss {text}, image loss {image}, gradient norm "
                f"{gradient_norm}); training stopped, the last checkpoint is good; start a new run from it "
                "(init) with a lower learning rate"
            )
        self.state = ckpt.TrainState(n + 1, weights, ema)
        self.model.update(self.step.model_weights(weights))
        values = {
            "text_loss": text,
            "image_loss": image,
            "loss": self.step.loss(text, image, loaded.text_total, loaded.image_total),
            "gradient_norm": gradient_norm,
            "learning_rate": c.optimizer.learning_rate * factor,
            "tokens_per_second": loaded.tokens * self.group.size() / (time.perf_counter() - start),
            "data_wait": waited / (waited + time.perf_counter() - start),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        progress.advance(n + 1, values)
        if log is not None and (n + 1) % c.log_every == 0:
            log.write(n + 1, values | (self.step.signals.collect() if self.step.signals else {}))
        return stop

    def _observe(self, step: int, values: dict[str, float]) -> None:
        """Consistency training can blow up while its loss stays small: stop before that is saved."""
        if self.step.signals is None:
            return
        if trouble := self.watch.observe(step, {"tangent": self.step.signals.tangent(), **values}):
            raise UserError(
                f"step {step}: consistency training blew up: {trouble}; the last checkpoint is good; start a new "
                "run from it (init) with a lower learning rate"
            )

    def _gradients(self, loaded: Loaded, interrupt: Interrupt, step: int) -> tuple[Any, np.ndarray, bool]:
        """Gradients and summed losses [text, image] of all parts and processes; whether any was asked to stop."""
        gradients: Any = None
        sums = mx.zeros((2,))
        for part in loaded.parts:
            more, part_sums = self.step.gradients(
                self.state.weights, part, loaded.text_total, loaded.image_total, step
            )
            gradients = more if gradients is None else tree_map(mx.add, gradients, more)
            sums = sums + part_sums
            mx.eval(gradients, sums)
        sums = mx.concatenate([sums, mx.array([float(interrupt.requested)])])
        if self.group.size() > 1:
            with meeting():
                gradients, sums = self._all_sum(gradients), mx.distributed.all_sum(sums)
                mx.eval(sums)
        *losses, stop = np.array(sums)
        return gradients, np.array(losses), bool(stop)

    def _all_sum(self, gradients: Any) -> Any:
        """Sum over processes in one message: a ring is bound by the number of messages, not their size.

        Sorted by name, because the optimiser hands trees back in an order that differs between processes.
        """
        leaves = sorted(dict(tree_flatten(gradients)).items())
        flat = mx.distributed.all_sum(mx.concatenate([g.reshape(-1) for _, g in leaves]))
        mx.eval(flat)
        ends = np.cumsum([g.size for _, g in leaves]).tolist()
        pieces = mx.split(flat, ends[:-1])
        return tree_unflatten([(k, p.reshape(g.shape)) for (k, g), p in zip(leaves, pieces, strict=True)])

    def _after_step(self, progress: Progress, log: MetricsLog | None) -> None:
        c, n = self.config, self.state.step
        if self.valid_data is not None and c.valid_every and n % c.valid_every == 0:
            values = self._validate()
            progress.note(f"step {n}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            if log is not None:
                log.write(n, values)
            self._keep_best(values, progress)
        if c.sample.every and n % c.sample.every == 0 and self.is_main:
            self._sample_grid()
        if n % c.save_every == 0 and n < c.steps and self.watch.calm:
            self._save()

    def _keep_best(self, values: dict[str, float], progress: Progress) -> None:
        """Save the averaged weights when validation says that they are the best so far."""
        self.best = self.best.observe(self.state.step, values)
        if self.best.step == self.state.step and self.is_main:
            extra = self._objective()
            with self._averaged():
                write_best(
                    self.output, self.best, lambda to: self.step.save(to, self.model, self.tokenizer, extra)
                )
        if self.best.stop:
            progress.note(
                f"stopped: {self.best.metric} was lowest ({self.best.value:.4f}) at step {self.best.step}, and the "
                f"last {self.best.since} validations were not better"
            )

    def _validate(self) -> dict[str, float]:
        """Losses of the EMA weights on fixed validation batches, per modality."""
        assert self.valid_data is not None
        with self._averaged():
            return self.step.validate(self.valid_data, self.config.valid_batches, self.config.batch_size)

    def _sample_grid(self) -> None:
        file = self.output / "samples" / f"step-{self.state.step:08d}.png"
        with self._averaged():
            self.step.paint_grid(self.tokenizer, file)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the EMA weights."""
        self.model.update(self.state.ema)
        try:
            yield
        finally:
            self.model.update(self.step.model_weights(self.state.weights))

    def _objective(self) -> dict[str, Any] | None:
        """What a consistency model's config.json says about how it must be sampled."""
        if self.config.consistency is None:
            return None
        teacher = self.teacher.fingerprint if self.teacher else None
        return {"objective": self.config.consistency.objective(teacher)}

    def _save(self) -> Path:
        folder = self.output / "checkpoints"
        path = folder / f"{ckpt.PREFIX}{self.state.step:08d}"
        if self.is_main:
            record = {"config": self.config.to_dict(), "best": self.best.record()}
            path = ckpt.save_checkpoint(
                folder,
                self.state,
                self.optimizer,
                self.model,
                self.tokenizer,
                record,
                self.config.keep,
                extra=self._objective(),
                save=self.step.save,
            )
        wait_for_all()
        return path


def train(config: TrainConfig, resume: bool = True) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    resume=True continues the run in `config.output` when it has checkpoints. With False an output folder that
    already has checkpoints is refused. Raises UserError for bad input, and when a loss is not finite any more.
    """
    trainer = Trainer(config)
    resumed = resume and trainer.resume()
    if not resumed and ckpt.checkpoints(trainer.output / "checkpoints"):
        raise UserError(
            f"{trainer.output}: holds checkpoints already; resume them (--resume) or choose another output"
        )
    return trainer.run()
