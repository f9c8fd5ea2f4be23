"""The training loop: one path from a TrainConfig to checkpoints, metrics and sample grids.

Runs on one process, or on several under `mlx.launch` (data parallel: every process takes its share of each
batch's documents, gradients are summed, and all hold the same weights).
"""

from __future__ import annotations

import math
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.config import TrainConfig, model_config
from mlx_transfusion.training.data import Batch, DataSet
from mlx_transfusion.training.interrupt import Interrupt
from mlx_transfusion.training.metrics import MetricsLog
from mlx_transfusion.training.optimizer import ema_decay, make_optimizer, set_learning_rate
from mlx_transfusion.training.progress import Progress
from mlx_transfusion.training.schedule import learning_rate_factor
from mlx_transfusion.training.step import Step, evaluate_batch


@dataclass(frozen=True)
class Loaded:
    """One step's share of this process, cut into parts, with the totals of the whole step."""

    parts: list[Batch]
    text_total: int
    image_total: int
    tokens: int


class Trainer:
    """Owns the state of one run; `run` trains it to the end."""

    def __init__(self, config: TrainConfig) -> None:
        """Builds model, data and optimiser. Raises UserError for bad config or data."""
        self.config = config
        self.group = mx.distributed.init()
        if config.batch_size < self.group.size() * config.accumulate:
            raise UserError(
                f"batch_size {config.batch_size} is too small for {self.group.size()} processes with "
                f"{config.accumulate} parts each: every part needs a document"
            )
        self.output = Path(config.output)
        self.tokenizer = Tokenizer.load(config.tokenizer)
        begun = bool(ckpt.checkpoints(self.output / "checkpoints"))
        self.model = _new_model(config, self.tokenizer, None if begun else config.init)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        shared = {
            "data": config.data,
            "diffusion": config.diffusion,
            "model": self.model.config,
            "tokenizer": self.tokenizer,
            "seed": config.seed,
            "sequence_length": config.sequence_length,
        }
        self.train_data = DataSet(config.data.train, **shared)  # type: ignore[arg-type]
        self.valid_data = (
            DataSet(config.data.valid, stream="valid", **shared)  # type: ignore[arg-type]
            if config.data.valid
            else None
        )
        self.optimizer = make_optimizer(config.optimizer)
        weights = self.model.parameters()
        self.optimizer.init(weights)
        self.state = ckpt.TrainState(0, weights, tree_map(lambda w: w, weights))
        self.step = Step(self.model, self.optimizer, config)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.group.rank() == 0

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one. Raises UserError when it belongs to another run."""
        found = ckpt.checkpoints(self.output / "checkpoints")
        if not found:
            return False
        record = ckpt.read_record(found[-1])
        _check_same_run(record["config"], self.config.to_dict(), found[-1])
        self.state = ckpt.load_checkpoint(found[-1], self.optimizer)
        self.model.update(self.state.weights)
        self.step = Step(self.model, self.optimizer, self.config)  # compiled over the restored state
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
                with ThreadPoolExecutor(1) as loader:
                    self._loop(loader, interrupt, progress, log)
                return self._save()
        finally:
            if log is not None:
                log.close()

    def _loop(
        self, loader: ThreadPoolExecutor, interrupt: Interrupt, progress: Progress, log: MetricsLog | None
    ) -> None:
        steps = self.config.steps
        ahead: Future[Loaded] | None = None
        while self.state.step < steps:
            n = self.state.step
            loaded = ahead.result() if ahead else self._load(n)
            ahead = loader.submit(self._load, n + 1) if n + 1 < steps else None
            stop = self._train_step(loaded, interrupt, progress, log)
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
        totals = [self.train_data.count(d) for d in documents]
        parts = []
        for part in range(c.accumulate):
            mine = documents[self.group.rank() + part * ranks :: ranks * c.accumulate]
            if mine:
                parts.append(self.train_data.batch(mine))
        return Loaded(
            parts, sum(t for t, _ in totals), sum(i for _, i in totals), sum(b.packed.tokens for b in parts)
        )

    def _train_step(
        self, loaded: Loaded, interrupt: Interrupt, progress: Progress, log: MetricsLog | None
    ) -> bool:
        """One optimiser step. Returns whether any process was asked to stop."""
        c, n = self.config, self.state.step
        start = time.perf_counter()
        gradients, sums, stop = self._gradients(loaded, interrupt)
        factor = learning_rate_factor(n, c.steps, c.optimizer)
        set_learning_rate(self.optimizer, c.optimizer, factor)
        weights, ema, norm = self.step.update(
            gradients, self.state.weights, self.state.ema, ema_decay(n, c.ema)
        )
        mx.eval(weights, ema, self.optimizer.state, norm)
        text, image = (float(x) for x in sums / np.maximum(1, [loaded.text_total, loaded.image_total]))
        gradient_norm = float(np.array(norm))
        if not all(map(math.isfinite, (text, image, gradient_norm))):
            raise UserError(
                f"step {n + 1}: not finite any more (text loss {text}, image loss {image}, gradient norm "
                f"{gradient_norm}); training stopped, the last checkpoint is good; start a new run from it "
                "(init) with a lower learning rate"
            )
        self.state = ckpt.TrainState(n + 1, weights, ema)
        self.model.update(weights)
        values = {
            "text_loss": text,
            "image_loss": image,
            "loss": text + c.image_loss_weight * image,
            "gradient_norm": gradient_norm,
            "learning_rate": c.optimizer.learning_rate * factor,
            "tokens_per_second": loaded.tokens * self.group.size() / (time.perf_counter() - start),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        progress.advance(n + 1, values)
        if log is not None and (n + 1) % c.log_every == 0:
            log.write(n + 1, values)
        return stop

    def _gradients(self, loaded: Loaded, interrupt: Interrupt) -> tuple[Any, np.ndarray, bool]:
        """Gradients and summed losses [text, image] of all parts and processes; whether any was asked to stop."""
        gradients: Any = None
        sums = mx.zeros((2,))
        for part in loaded.parts:
            more, part_sums = self.step.gradients(
                self.state.weights, part, loaded.text_total, loaded.image_total
            )
            gradients = more if gradients is None else tree_map(mx.add, gradients, more)
            sums = sums + part_sums
            mx.eval(gradients, sums)
        sums = mx.concatenate([sums, mx.array([float(interrupt.requested)])])
        if self.group.size() > 1:
            gradients, sums = self._all_sum(gradients), mx.distributed.all_sum(sums)
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
        if c.sample.every and n % c.sample.every == 0 and self.is_main:
            self._sample_grid()
        if n % c.save_every == 0 and n < c.steps:
            self._save()

    def _validate(self) -> dict[str, float]:
        """Losses of the EMA weights on fixed validation batches, per modality."""
        assert self.valid_data is not None
        self.model.update(self.state.ema)
        total = np.zeros(4)
        for i in range(self.config.valid_batches):
            batch = self.valid_data.batch(self.valid_data.documents(i, self.config.batch_size))
            total += evaluate_batch(self.model, batch)
        self.model.update(self.state.weights)
        return {
            "valid_text_loss": float(total[0] / max(1, total[1])),
            "valid_image_loss": float(total[2] / max(1, total[3])),
        }

    def _sample_grid(self) -> None:
        from mlx_transfusion.training.preview import paint_grid

        self.model.update(self.state.ema)
        file = self.output / "samples" / f"step-{self.state.step:08d}.png"
        paint_grid(self.model, self.tokenizer, self.config.sample, file)
        self.model.update(self.state.weights)

    def _save(self) -> Path:
        folder = self.output / "checkpoints"
        path = folder / f"{ckpt.PREFIX}{self.state.step:08d}"
        if self.is_main:
            record = {"config": self.config.to_dict()}
            path = ckpt.save_checkpoint(
                folder, self.state, self.optimizer, self.model, self.tokenizer, record, self.config.keep
            )
        if self.group.size() > 1:
            mx.eval(mx.distributed.all_sum(mx.zeros((1,))))  # nobody runs ahead of the file
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


def _new_model(config: TrainConfig, tokenizer: Tokenizer, init: str | None) -> Transfusion:
    """Random weights from the seed, or those of the model `init`, which must be of the same shape."""
    special = {
        f"{name}_token_id": getattr(tokenizer.special, name)
        for name in ("pad", "bos", "eos", "unk", "boi", "eoi")
    }
    shape = model_config(config, tokenizer.vocab_size, special)
    mx.random.seed(config.seed)
    model = Transfusion(shape)
    if init is not None:
        from mlx_transfusion.model_io import load

        start = load(init, dtype=mx.float32).model  # stored in half precision perhaps
        theirs, ours = start.config.to_dict(), shape.to_dict()
        if differs := [key for key in ours if theirs[key] != ours[key]]:
            raise UserError(
                f"init {init}: its {differs[0]} is {theirs[differs[0]]}, [model] of this run says "
                f"{ours[differs[0]]}"
            )
        model.update(start.parameters())
    mx.eval(model.parameters())
    return model


_MAY_CHANGE = re.compile(
    r"(output|tokenizer|init|log_every|valid_every|valid_batches|save_every|keep|accumulate|compile"
    r"|gradient_checkpointing)|sample\..*|data\.(valid|threads|cache_gib|check_images|skip_bad_rows)\b.*"
    r"|data\.train\.\d+\.(rows|images)"
)
"""Keys that may differ on resume without changing what is learned (files may have moved)."""


def _check_same_run(recorded: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raises UserError that names the first key, e.g. `optimizer.learning_rate`, that makes it another run."""
    old, new = dict(tree_flatten(recorded)), dict(tree_flatten(wanted))
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key) and not _MAY_CHANGE.fullmatch(key):
            raise UserError(
                f"{path}: was trained with {key} = {old.get(key)}, the config says {new.get(key)}; "
                "use the same config or another output folder"
            )
