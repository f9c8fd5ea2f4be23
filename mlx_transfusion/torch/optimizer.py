"""AdamW, clipping and the moving average of the weights, on shards: the numbers of `training/optimizer.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.config import OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW with its state in place from the start. fused: one kernel for all; None: on CUDA.

    Raises UserError for another optimiser.
    """
    if config.name != "adamw":
        raise UserError(
            f'optimizer.name is "{config.name}": the PyTorch path has "adamw" alone; '
            "use --set optimizer.name=adamw"
        )
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        by_mesh(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=parameters[0].device.type == "cuda" if fused is None else fused,
    )
    for p in parameters:
        # There from the beginning, so that a checkpoint can be read into it before the first step.
        device = p.device if p.device.type == "cuda" else None
        optimizer.state[p] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set how many updates were made: what AdamW's bias correction counts."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups by the mesh that they are sharded over: an operation on many tensors takes one mesh alone."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return [{"params": group} for group in groups.values()]


def clip(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them); returns the norm before."""
    groups = [group["params"] for group in by_mesh(parameters)]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = whole[0] if len(whole) == 1 else torch.stack(whole).norm()
    if limit > 0:
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, limit, norm)
    return float(norm)


class Average:
    """Exponential moving average of a model's parameters, sharded as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        ours = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(ours, [local(p.detach()) for p in model.parameters()], 1 - decay)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights, and `values` has the model's."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass alone leaves gathered weights behind, which would be used again
        for name, p in model.named_parameters():
            ours, theirs = local(p), local(self.values[name])
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
