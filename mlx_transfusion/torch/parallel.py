"""Processes, sharding and compilation: what a run does to a model before it trains.

One path for one process and for many: FSDP2 over all (gloo on CPUs, nccl on GPUs), with each decoder block, the
U-Nets and the rest as units that are gathered when they are needed. Weights, gradients and optimiser are float32
shards; `dtype = "bfloat16"` is the precision of gathered weights and of the arithmetic. The angle's embedding stays
float32 in any case, because a consistency model differentiates it.
"""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.plan import check_tensor
from mlx_transfusion.torch.tensor_parallel import split_blocks


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    tensor: int = 1
    """Neighbouring processes that share the blocks and read the same documents (`tensor_parallel.py`)."""

    @property
    def share(self) -> int:
        """Which share of the documents this process reads."""
        return self.rank // self.tensor

    @property
    def shares(self) -> int:
        """How many shares the documents are dealt into."""
        return self.size // self.tensor

    @property
    def is_main(self) -> bool:
        """Whether this process writes metrics and shows progress."""
        return self.rank == 0

    def peak_memory(self) -> int:
        """Bytes: the most that tensors took on this process's GPU, or the whole process in main memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def processes() -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one; leaves them at the end."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # gloo beside nccl: checkpoints that are written in the background are agreed on while the GPUs compute.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def make_mesh(world: World, groups: int = 1) -> DeviceMesh:
    """All processes in one row, or in `groups` copies of the model that are each sharded (hybrid sharding).

    The dimensions are "replica", "shard" and "tensor"; the first and the last are left out when they are 1. Raises
    UserError when the processes cannot be dealt out evenly.
    """
    if min(groups, world.tensor) < 1 or world.size % (groups * world.tensor):
        raise UserError(
            f"--replicas {groups} --tensor {world.tensor}: {world.size} processes cannot be dealt into as many "
            "equal groups"
        )
    sizes = {"replica": groups, "shard": world.shares // groups, "tensor": world.tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh over which documents are dealt out: all but "tensor"."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")
    return mesh[names] if names != mesh.mesh_dim_names else mesh


def build_sharded(
    config: ModelConfig, mesh: DeviceMesh, dtype: str, device: torch.device, reshard: bool = True
) -> Transfusion:
    """A model whose parameters are shards without values, made on the meta device and never whole anywhere.

    `initial.initialise` or `folder.fill` gives the values. reshard: free a block's gathered weights behind its
    forward pass; False keeps them until its backward pass (more memory, less traffic).
    """
    with torch.device("meta"):
        model = Transfusion(config)
    shard(model, mesh, dtype, reshard)
    model.to_empty(device=device)
    return model


def shard(model: Transfusion, mesh: DeviceMesh, dtype: str, reshard: bool = True) -> None:
    """Apply tensor parallelism, where the mesh has it, and FSDP2 in place."""
    if "tensor" in (mesh.mesh_dim_names or ()):
        check_tensor(model.config, mesh["tensor"].size())
        split_blocks(model, mesh["tensor"])
    mesh = data_mesh(mesh)
    param = torch.bfloat16 if dtype == "bfloat16" else None
    # Inputs are cast by the model itself: an angle in bfloat16 would be wrong in its third digit.
    mixed = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model.angle_embedding, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
    for part in (*model.layers, model.patch_encoder, model.patch_decoder):
        fully_shard(part, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    # Keys and values leave a block as views of its products; nothing here writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for method in ("read_prefix", "paint", "cos_velocity"):
        register_fsdp_forward_method(model, method)


def compile_blocks(model: Transfusion, backend: str = "inductor") -> None:
    """torch.compile for each block on its own: one compilation serves all layers."""
    for layer in model.layers:
        layer.compile(backend=backend)


def synchronise(model: Transfusion, last: bool) -> None:
    """Send gradients to their shards behind the `last` part of a step alone, and add up the others locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
