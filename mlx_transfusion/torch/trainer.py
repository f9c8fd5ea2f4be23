"""The training loop of the PyTorch path: the TOML, documents, noise and schedule of the MLX side, on many GPUs.

Every process draws the same documents of a step and takes its share, so there is no data position to save: batch and
noise are functions of (seed, step), and a run resumes on any number of processes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.torch import checkpoint as ckpt
from mlx_transfusion.torch.guard import Guard
from mlx_transfusion.torch.loader import Loaded, Loader
from mlx_transfusion.torch.machines import Machines, peak_of
from mlx_transfusion.torch.optimizer import Average, clip, make_optimizer, set_updates
from mlx_transfusion.torch.parallel import World, compile_blocks, make_mesh, synchronise
from mlx_transfusion.torch.start import new_model, run_config
from mlx_transfusion.torch.step import Step
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.interrupt import Interrupt, terminated
from mlx_transfusion.training.metrics import MetricsLog
from mlx_transfusion.training.progress import Progress as Bar
from mlx_transfusion.training.same_run import check_same_run
from mlx_transfusion.training.schedule import ema_decay, learning_rate_factor
from mlx_transfusion.training.shard_set import open_data


class Trainer:
    """Owns the state of one run; `run` trains it to the end."""

    def __init__(self, config: TrainConfig, machines: Machines, world: World) -> None:
        """Builds the sharded model, data and optimiser. Raises UserError for bad config or data."""
        self.world = world = replace(world, tensor=machines.tensor)
        self.config, self.machines = config, machines
        mesh = make_mesh(world, machines.replicas)
        if config.batch_size < world.shares * config.accumulate:
            raise UserError(
                f"batch_size {config.batch_size} is too small for {world.shares} shares with "
                f"{config.accumulate} parts each: every part needs a document"
            )
        self.output, self.folder = Path(config.output), Path(config.output) / "torch"
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self.model = new_model(config, self.tokenizer, mesh, world, machines.reshard)
        self.model.checkpointing = machines.recompute_every if config.gradient_checkpointing else 0
        self.model.keep_products = machines.recompute == "cheap"
        if machines.compile:
            compile_blocks(self.model)
        self.train_data = self._data_set(config.data.train, "train")
        self.valid_data = self._data_set(config.data.valid, "valid") if config.data.valid else None
        self.step = self._new_step(mesh)
        self.trained = dict(self.model.named_parameters()) | self.step.extra_parameters()
        self.optimizer = make_optimizer(config.optimizer, self.trained.values())
        self.average = Average(self.model)
        self.progress = ckpt.Progress()
        record = run_config(config, self.model.config, self.step.extra_tables())
        self.saver = ckpt.Saver(self.folder, config.keep, record, machines.background_save)
        self.guard = Guard(world, machines.max_skipped, machines.spike)
        self.peak_flops = peak_of(world, machines.peak_flops)

    def _data_set(self, sources: Any, stream: str) -> Any:
        c = self.config
        return open_data(
            sources, c.data, c.diffusion, self.model.config, self.tokenizer,
            seed=c.seed, sequence_length=c.sequence_length, stream=stream,
        )  # fmt: skip

    def _new_step(self, mesh: Any) -> Step:
        if self.world.tensor > 1 and self.config.consistency is not None:
            raise UserError("--tensor: a consistency model is trained without it: leave it out")
        form, on_cuda = self.machines.attention, self.world.device.type == "cuda"
        if form == "flex" and not on_cuda:
            raise UserError("--attention flex trains on CUDA alone: use dense here")
        flex = form == "flex" or (form == "auto" and on_cuda)
        if self.config.consistency is None:
            return Step(self.model, self.config, self.world, flex)
        from mlx_transfusion.torch.consistency_step import ConsistencyStep

        return ConsistencyStep(self.model, self.config, self.world, flex, mesh, self.machines.jvp_attention)

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint, if there is one. Raises UserError for another run's."""
        found = ckpt.newest_good(self.folder)
        if found is None:
            return False
        path, record = found
        recorded = record["config"]["training"]
        then = from_dict(TrainConfig, recorded, f"{path}: the training config in it")
        check_same_run(then.to_dict(), self.config.to_dict(), path)
        ckpt.restore(path, ckpt.training_state(self.trained, self.optimizer, self.average))
        self.progress = ckpt.Progress(record["step"], record["updates"], record["skipped"])
        self.guard.restore(record.get("recent", []))
        set_updates(self.optimizer, self.progress.updates)
        if self.world.is_main:
            print(f"resumed from {path} ({record['world']} processes wrote it)", file=sys.stderr)
        return True

    def run(self) -> Path:
        """Train to `config.steps`; returns the last checkpoint.

        SIGTERM and Ctrl-C end the step in hand and save; KeyboardInterrupt is raised then.
        """
        config, log = self.config, None
        if self.world.is_main:
            log = MetricsLog(self.output, self.progress.step)
        try:
            with Bar(config.steps, self.progress.step, self.world.is_main) as bar, Interrupt() as interrupt:
                with terminated(interrupt):
                    self._loop(interrupt, bar, log)
                return self._save(wait=True)
        finally:
            if log is not None:
                log.close()

    def _loop(self, interrupt: Interrupt, bar: Bar, log: MetricsLog | None) -> None:
        loader = Loader(self.train_data, self.step, self.config, self.world.share, self.world.shares)
        start = time.perf_counter()
        for loaded in loader.steps(self.progress.step, self.machines.workers):
            stop = self._train_step(loaded, start, interrupt, bar, log)
            self._after_step(bar, log)
            if stop:
                self._save(wait=True)
                raise KeyboardInterrupt
            start = time.perf_counter()  # waiting for data counts, validating and saving do not

    def _train_step(
        self, loaded: Loaded, start: float, interrupt: Interrupt, bar: Bar, log: MetricsLog | None
    ) -> bool:
        """One optimiser step, timed from `start`. Returns whether any process was asked to stop."""
        c, n = self.config, self.progress.step
        sums = self._gradients(loaded, n).double()
        counts = [loaded.tokens, loaded.flops, interrupt.requested, not self.saver.written]
        everything = torch.cat([sums, sums.new_tensor(counts)])
        dist.all_reduce(everything)
        # Neighbours that share the blocks read the same documents.
        text, image, tokens, flops, stop, writing = (everything / self.world.tensor).tolist()
        text, image = text / max(1, loaded.text_total), image / max(1, loaded.image_total)
        if self.saver.pending and not writing:
            self.saver.finish()
        factor = learning_rate_factor(n, c.steps, c.optimizer)
        norm = self._update(text + c.image_loss_weight * image, c.optimizer.learning_rate * factor)
        self.progress.step += 1
        seconds = time.perf_counter() - start
        values = {
            "text_loss": text,
            "image_loss": image,
            "loss": text + c.image_loss_weight * image,
            "gradient_norm": norm,
            "learning_rate": c.optimizer.learning_rate * factor,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": self.world.peak_memory() / 1e9,
            "skipped_steps": self.progress.skipped,
        }
        if flops and self.peak_flops:
            values["mfu"] = flops / seconds / (self.peak_flops * self.world.size)
        bar.advance(n + 1, values)
        if log is not None and (n + 1) % c.log_every == 0:
            log.write(n + 1, values | self.step.signals())
        return bool(stop)

    def _gradients(self, loaded: Loaded, step: int) -> Tensor:
        """Gradients of all parts, in the weights' `grad`; this process's summed losses [text, image]."""
        sums = torch.zeros(2, device=self.world.device)
        for i, part in enumerate(loaded.parts):
            synchronise(self.model, last=i == len(loaded.parts) - 1)
            sums += self.step.backward(part, loaded.text_total, loaded.image_total, step)
        return sums

    def _update(self, loss: float, rate: float) -> float:
        """Clip and step, unless the guard finds the step bad: then it is skipped and counted."""
        norm = clip(self.trained.values(), self.config.optimizer.clip)
        if (fault := self.guard.fault(loss, norm)) is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.average.update(self.model, ema_decay(self.progress.step, self.config.ema))
            self.progress.updates += 1
            self.guard.accept(loss, norm)
        else:
            self.progress.skipped += 1
            line = self.guard.skip(self.progress.step + 1, fault)
            if self.world.is_main:
                print(line, file=sys.stderr)
        self.optimizer.zero_grad()
        return norm

    def _after_step(self, bar: Bar, log: MetricsLog | None) -> None:
        c, n = self.config, self.progress.step
        if self.valid_data is not None and c.valid_every and n % c.valid_every == 0:
            values = self._validate()
            bar.note(f"step {n}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            if log is not None:
                log.write(n, values)
        if n % c.save_every == 0 and n < c.steps:
            self._save()

    def _validate(self) -> dict[str, float]:
        """Losses of the averaged weights on fixed validation batches, per modality."""
        assert self.valid_data is not None
        c, data = self.config, self.valid_data
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        with self.average.inside(self.model):
            for i in range(c.valid_batches):
                batch = data.batch(data.documents(i, c.batch_size)[self.world.share :: self.world.shares])
                counts = sums.new_tensor([batch.text_targets, (batch.angle > 0).sum()])
                sums += torch.cat([self.step.evaluate(batch).double(), counts])
        dist.all_reduce(sums)
        text, image, tokens, pictures = sums.tolist()
        return {"valid_text_loss": text / max(1, tokens), "valid_image_loss": image / max(1, pictures)}

    def _save(self, wait: bool = False) -> Path:
        tree = ckpt.training_state(self.trained, self.optimizer, self.average)
        self.progress.recent = self.guard.recent
        path = self.saver.save(tree, self.progress)
        if wait:
            self.saver.finish()
        return path


def train(config: TrainConfig, machines: Machines, world: World, resume: bool = True) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    resume=True continues the run in `config.output` when it has checkpoints; with False such a folder is refused.
    Raises UserError for bad input, and when too many steps in a row are not finite.
    """
    trainer = Trainer(config, machines, world)
    if not (resume and trainer.resume()) and ckpt.checkpoints(trainer.folder):
        raise UserError(
            f"{trainer.output}: holds checkpoints already; resume them (--resume) or choose another output"
        )
    return trainer.run()
