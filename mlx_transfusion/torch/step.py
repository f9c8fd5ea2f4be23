"""Gradients of one step's parts: the diffusion objective on sharded weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlx_transfusion.flops import step_flops, work_of
from mlx_transfusion.torch import losses
from mlx_transfusion.torch.batch import to_example
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.parallel import World
from mlx_transfusion.training.config import TrainConfig


class Step:
    """The objective of diffusion training (arXiv 2408.11039, eq. 4)."""

    def __init__(self, model: Transfusion, config: TrainConfig, world: World, flex: bool) -> None:
        self.model, self.config, self.world, self.flex = model, config, world, flex

    def load(self, data: Any, documents: Sequence[Any]) -> Any:
        """Arrays of one part of a step from a DataSet or a ShardSet (numpy only: it runs in a thread)."""
        return data.batch(documents)

    def count(self, data: Any, document: Any) -> tuple[int, int]:
        """(text-loss tokens, pictures in the loss) of a document: its part of the step's totals."""
        return data.count(document)

    def flops(self, batch: Any) -> float:
        """Operations that the documents of a part need, forward and backward (numpy only); 0: not counted."""
        config = self.model.config
        return step_flops(config, work_of(batch.packed, bidirectional=config.bidirectional))

    def backward(self, batch: Any, text_total: int, image_total: int, step: int) -> Tensor:
        """Add this part's gradients to the weights; returns its summed losses [text, image].

        The totals are those of the whole step, over all processes and parts, so that parts simply add up.
        """
        sums = self._sums(batch)
        # Sharded gradients are means over processes; the objective is a sum.
        scale = self.world.shares * sums.new_tensor(
            [1 / max(1, text_total), self.config.image_loss_weight / max(1, image_total)]
        )
        (sums * scale).sum().backward()
        return sums.detach()

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Tensor:
        """Summed losses [text, image] of a batch without gradients."""
        return self._sums(batch)

    def _sums(self, batch: Any) -> Tensor:
        example = to_example(batch, self.model.config, self.world.device, self.flex)
        logits, prediction = self.model(example.arrays)
        text = losses.text_loss(logits, example.text_target, example.text_weight)
        image = losses.image_errors(prediction, example.target) * example.image_weight
        return torch.stack([text, image.sum()])

    def extra_parameters(self) -> dict[str, Any]:
        """What is trained beside the model, by name."""
        return {}

    def extra_tables(self) -> dict[str, Any]:
        """What an export's config.json says besides the model's own fields."""
        return {}

    def signals(self) -> dict[str, float]:
        """What else the metrics are told."""
        return {}
