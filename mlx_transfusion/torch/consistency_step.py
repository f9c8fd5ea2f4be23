"""Gradients of a consistency step on sharded weights: sCM or ECT on pictures behind prefixes, text loss on text.

The batch is that of the MLX side (`training/prefix_data.py`), and so is the objective
(`training/consistency_step.py`) with student "full": distillation from a guided teacher, with one scale or a range of
them, or training on the data alone, by sCM or ECT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mlx_transfusion import trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import resolve
from mlx_transfusion.torch import consistency, folder, losses
from mlx_transfusion.torch.batch import encode, move, to_example
from mlx_transfusion.torch.fused_jvp import forward_mode_attention
from mlx_transfusion.torch.initial import initialise
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.parallel import World, build_sharded
from mlx_transfusion.torch.patches import patchify
from mlx_transfusion.torch.step import Step
from mlx_transfusion.torch.tangents import Networks, States, method_of
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import DataSet, Document
from mlx_transfusion.training.prefix_data import PrefixBatch, count, guidance_scales, prefix_batch

LOSS_WEIGHT = "loss_weight"
"""How the weighting network's parameters are named beside the model's; an export leaves them out."""


def fingerprint(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a model's weight files: `model_io.Loaded.fingerprint`."""
    digest = hashlib.sha256()
    for file in folder.weight_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


class Pictures(NamedTuple):
    """The pictures of a PrefixBatch as tensors."""

    ids: Tensor  # int64 [M, S]
    lengths: Tensor  # int64 [M]
    weight: Tensor  # float32 [M]
    x: Tensor  # noisy patches [M, N, P]
    angle: Tensor  # float32 [M]
    sample_velocity: Tensor  # cos(a) times the velocity of the sample itself [M, N, P]
    guidance: Tensor | None  # scales [M], where pictures have scales of their own


class ConsistencyStep(Step):
    """The objective of sCM (arXiv 2410.11081, Algorithm 1) or ECT (arXiv 2406.14548) beside the text loss."""

    def __init__(
        self,
        model: Transfusion,
        config: TrainConfig,
        world: World,
        flex: bool,
        mesh: DeviceMesh,
        jvp_attention: str = "plain",
    ) -> None:
        """Loads and shards the teacher. jvp_attention: as `Machines.jvp_attention`.

        Raises UserError for options that the MLX side alone has, and for a fused attention that cannot run here.
        """
        super().__init__(model, config, world, flex)
        assert config.consistency is not None
        self.settings = config.consistency
        s = self.settings
        if s.method not in ("scm", "ect") or s.student != "full" or s.text != "data":
            raise UserError(
                f'consistency.method "{s.method}" with student "{s.student}" and text "{s.text}": the PyTorch '
                'path has "scm" and "ect" with "full" and "data"; train the others with mlx-transfusion distill'
            )
        if config.dtype != "float32":
            raise UserError(f'dtype is "{config.dtype}": a consistency model is trained in "float32"')
        self.method = method_of(self.settings, config.steps)
        self.jvp_attention = forward_mode_attention(jvp_attention, world.device, model.config.head_dim)
        self.teacher = self._load_teacher(mesh)
        self.loss_weight = consistency.LossWeight().to(world.device)
        initialise(self.loss_weight, model.config, config.seed, f"{LOSS_WEIGHT}.")
        fully_shard(self.loss_weight, mesh=mesh)
        self.seen: dict[str, float] = {}

    def _load_teacher(self, mesh: DeviceMesh) -> Transfusion | None:
        if self.settings.teacher is None:
            return None
        path = resolve(self.settings.teacher)
        shape, extra = folder.read_config(path)
        if extra.get("objective", {}).get("name") == "consistency":
            raise UserError(
                f"teacher {path}: is a consistency model itself; distil the diffusion model it came from"
            )
        teacher = build_sharded(shape, mesh, "float32", self.world.device)
        folder.fill(teacher, path)
        return teacher.requires_grad_(False)

    def extra_parameters(self) -> dict[str, Any]:
        """The weighting network's, when it is used."""
        if not self.settings.adaptive_weight:
            return {}
        return {f"{LOSS_WEIGHT}.{name}": p for name, p in self.loss_weight.named_parameters()}

    def load(self, data: DataSet, documents: Sequence[Document]) -> PrefixBatch:
        """Arrays of one part of a step (numpy only)."""
        batch = prefix_batch(data, documents, self.model.config.pad_token_id)
        if batch.rest is None and self.world.size > 1:
            # Every process gathers the same weights in the same order, whatever its own documents are.
            batch = replace(batch, rest=data.batch([]))
        if (between := self.settings.guidance_range) is None:
            return batch
        scales = guidance_scales(documents, len(batch.ids), *between, self.config.seed)
        return replace(batch, guidance=scales)

    def count(self, data: DataSet, document: Document) -> tuple[int, int]:
        """(text-loss tokens, pictures in the loss) of a document."""
        return count(data, document)

    def flops(self, batch: Any) -> float:
        """0: the passes of a distillation are not counted."""
        return 0.0

    def backward(self, batch: Any, text_total: int, image_total: int, step: int) -> Tensor:
        """Add this part's gradients; returns its summed losses [text, image]."""
        pictures = self._pictures(batch)
        hidden, prefix = self.model.read_prefix(pictures.ids)
        image = self._image_loss(pictures, prefix, self.method.pace(step))
        place, target, weight = (
            self._move(a) for a in (batch.text_index, batch.text_target, batch.text_weight)
        )
        text = losses.text_loss(self.model.lm_head(hidden.flatten(0, 1)[place]), target, weight)
        if batch.rest is not None:
            example = to_example(batch.rest, self.model.config, self.world.device, self.flex)
            logits, _ = self.model(example.arrays)
            text = text + losses.text_loss(logits, example.text_target, example.text_weight)
        sums = torch.stack([text, image])
        scale = self.world.shares * sums.new_tensor(
            [1 / max(1, text_total), self.config.image_loss_weight / max(1, image_total)]
        )
        (sums * scale).sum().backward()
        return sums.detach()

    def _image_loss(self, p: Pictures, prefix: list[Any], pace: float) -> Tensor:
        """Summed loss of the pictures."""
        cos_velocity = self._cos_velocity(p)
        paint = partial(self.model.paint, lengths=p.lengths, guidance=p.guidance)
        constant = [(k.detach(), v.detach()) for k, v in prefix]
        networks = Networks(
            partial(paint, prefix=prefix),
            partial(paint, prefix=constant),
            partial(paint, prefix=constant, attention=self.jvp_attention),
        )
        t = self.method.tangent(networks, States(p.x, p.angle, cos_velocity), pace)
        log_weight = self.loss_weight(p.angle) if self.settings.adaptive_weight else torch.zeros_like(p.angle)
        real = p.weight > 0
        if bool(real.any()):
            self.seen = {
                "tangent": float(consistency.rms(t.raw)[real].mean()),
                "derivative": float(consistency.rms(t.derivative)[real].mean()),
            }
        return (consistency.image_losses(t.network, t.rescaled, log_weight) * p.weight).sum()

    @torch.no_grad()
    def _cos_velocity(self, p: Pictures) -> Tensor:
        """cos(a) v [M, N, P]: the teacher's, guided, or that of the sample."""
        teacher, scale = self.teacher, self.settings.guidance
        if teacher is None:
            return p.sample_velocity
        _, prefix = teacher.read_prefix(p.ids)
        cond = teacher.cos_velocity(p.x, p.angle, prefix, p.lengths)
        if p.guidance is None and scale == 1:
            return cond
        c, m = teacher.config, p.x.shape[0]
        _, alone = teacher.read_prefix(torch.tensor([[c.bos_token_id, c.boi_token_id]], device=p.x.device))
        null = [(k.expand(m, -1, -1, -1), v.expand(m, -1, -1, -1)) for k, v in alone]
        free = teacher.cos_velocity(p.x, p.angle, null, torch.full_like(p.lengths, 2))
        return free + (scale if p.guidance is None else p.guidance[:, None, None]) * (cond - free)

    def _pictures(self, batch: PrefixBatch) -> Pictures:
        """Noise the pictures and move them to the device."""
        c = self.model.config
        x0 = encode(self._move(batch.pictures.pixels), c)
        z, angle = patchify(self._move(batch.pictures.noise), c.patch_size), self._move(batch.pictures.angle)
        a = angle[:, None, None]
        return Pictures(
            self._move(batch.ids),
            self._move(batch.lengths),
            self._move(batch.weight),
            trigflow.mix(x0, z, a),
            angle,
            a.cos() * trigflow.velocity_target(x0, z, a),
            None if batch.guidance is None else self._move(batch.guidance),
        )

    def _move(self, array: Any) -> Tensor:
        return move(array, self.world.device)

    def extra_tables(self) -> dict[str, Any]:
        """What a consistency model's config.json says about how it must be sampled, as the MLX side writes it."""
        s = self.settings
        teacher = None if s.teacher is None else fingerprint(resolve(s.teacher))
        return {"objective": s.objective(teacher)}

    def signals(self) -> dict[str, float]:
        """Mean RMS of the raw tangent and of J over the first process's pictures of the newest part."""
        return self.seen
