"""The real model, sharded over processes that are not there: bytes a process, without allocating any of them.

A fake process group answers for the others, and the parameters stay on the meta device. What is counted is what
`parallel.shard` and `optimizer.make_optimizer` make, not a formula.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.optimizer import Average, local, make_optimizer
from mlx_transfusion.torch.parallel import World, make_mesh, shard
from mlx_transfusion.training.config import OptimizerConfig


def dry_run(
    config: ModelConfig, processes: int, dtype: str, replicas: int = 1, rank: int = 0, tensor: int = 1
) -> dict[str, Any]:
    """Bytes of process `rank` of `processes`: weights, gradients, optimiser, average; and numbers of parameters.

    Raises UserError where a process group exists already, and for an optimiser that PyTorch does not have.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("--dry-run makes processes of its own: run it outside torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        mesh = make_mesh(World(rank, processes, torch.device("cpu"), tensor), replicas)
        with torch.device("meta"):
            model = Transfusion(config)
        shard(model, mesh, dtype)
        parameters = list(model.parameters())
        optimizer = make_optimizer(OptimizerConfig(), parameters)
        moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        average = Average(model)
        return {
            "parameters": sum(p.numel() for p in parameters),
            "weights": _bytes(parameters),
            "gradients": _bytes(parameters),  # one of the same type beside each weight
            "optimizer": _bytes(moments),
            "average": _bytes(list(average.values.values())),
            "on_device": sum(t.nbytes for t in map(local, parameters) if t.device.type != "meta"),
        }
    finally:
        dist.destroy_process_group()


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(local(t).nbytes for t in tensors)
