"""How a run uses its machines: nothing in here changes what is learned, but for which steps are left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlx_transfusion.torch.parallel import World
from mlx_transfusion.torch.plan import GPUS


@dataclass(frozen=True)
class Machines:
    """The flags of `mlx_transfusion.torch.train` beside the TOML."""

    attention: str = "auto"
    """"dense", "flex", or "auto": flex on CUDA."""
    jvp_attention: str = "plain"
    """sCM's derivative: "plain" attention is written out, "flash" is fused (CUDA, `fused_jvp.py`)."""
    compile: bool = False
    """torch.compile of every decoder block."""
    background_save: bool = False
    replicas: int = 1
    """Copies of the sharded model (hybrid sharding); gradients are averaged between them."""
    tensor: int = 1
    """Neighbouring processes that share the heads and the feed-forward of every block."""
    reshard: bool = True
    """Free a block's gathered weights behind its forward pass."""
    recompute_every: int = 1
    """With gradient_checkpointing: every n-th block is recomputed in the backward pass."""
    recompute: str = "all"
    """Of such a block: "all", or "cheap": all but products and attention, whose results are kept."""
    max_skipped: int = 10
    """Steps in a row that may be skipped because something is not finite or jumped."""
    workers: int = 0
    """Processes that read data ahead, beside each training process; 0 is a thread."""
    spike: float = 0.0
    """Skip a step whose loss or gradient norm is this many standard deviations above the mean of the steps before
    it (`guard.Guard`); 0 skips only what is not finite."""
    peak_flops: float | None = None
    """Operations a second of one GPU, which MFU is a share of; None: by the GPU's name, if it is known."""


def peak_of(world: World, given: float | None = None) -> float | None:
    """Dense bfloat16 operations a second of this process's GPU: `given`, or those of its name; None: unknown."""
    if given is not None or world.device.type != "cuda":
        return given
    return peak_of_name(torch.cuda.get_device_name(world.device))


def peak_of_name(name: str) -> float | None:
    """Those of the kind of GPU (`plan.GPUS`) whose name is a word of `name`; None for another kind."""
    words = name.lower().replace("-", " ").split()
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in words), None)
