"""`torchrun -m mlx_transfusion.torch.train CONFIG.toml`: the TOML of `mlx-transfusion train`, trained by PyTorch.

CONFIG.toml says what is learned; the flags say on what machines. Without torchrun it runs on one process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.faults import LOST, lost_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 130 after Ctrl-C, and after one line on stderr 2 for bad input and
    for a checkpoint that cannot be saved, 1 where another process is gone.
    """
    given = _parser().parse_args(arguments)
    try:
        path = _train(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not lost_process(error):
            raise
        print(f"error: {LOST}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print(path)
    return 0


def _train(given: argparse.Namespace) -> str:
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install 'mlx-transfusion[torch]'") from error
    from mlx_transfusion.torch.machines import Machines
    from mlx_transfusion.torch.parallel import processes
    from mlx_transfusion.torch.trainer import train
    from mlx_transfusion.training.config import load_train_config

    config = load_train_config(given.config, given.set)
    # On a CPU compilation takes longer than most runs that make sense there.
    compiled = config.compile and torch.cuda.is_available() if given.compile is None else given.compile
    machines = Machines(
        attention=given.attention,
        jvp_attention=given.jvp_attention,
        compile=compiled,
        background_save=given.background_save,
        replicas=given.replicas,
        tensor=given.tensor,
        reshard=not given.keep_gathered,
        recompute_every=given.recompute_every,
        recompute=given.recompute,
        max_skipped=given.max_skipped,
        workers=given.workers,
        spike=given.spike,
        peak_flops=given.peak_flops,
    )
    with processes() as world:
        return str(train(config, machines, world, given.resume))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_transfusion.torch.train", description=__doc__)
    flag = parser.add_argument
    flag("config", metavar="CONFIG.toml")
    flag("--set", action="append", metavar="KEY=VALUE", help="override a key of the config; repeatable")
    switch = argparse.BooleanOptionalAction
    flag("--resume", action=switch, default=True, help="go on from the newest whole checkpoint")
    flag("--attention", choices=("auto", "dense", "flex"), default="auto", help="auto: flex on CUDA")
    flag("--jvp-attention", choices=("plain", "flash"), default="plain",
         help="of sCM's derivative; flash is fused, on CUDA, with the package jvp-flash-attention")  # fmt: skip
    flag("--compile", action=switch, help="torch.compile each block; default: the config's, on CUDA alone")
    flag("--background-save", action="store_true", help="write checkpoints while training goes on")
    flag(
        "--replicas", type=int, default=1, metavar="N", help="N copies of the sharded model (hybrid sharding)"
    )
    flag("--tensor", type=int, default=1, metavar="N",
         help="N neighbouring processes share every block (tensor parallelism)")  # fmt: skip
    flag("--keep-gathered", action="store_true", help="keep a block's weights until its backward pass")
    flag("--recompute-every", type=int, default=1, metavar="N",
         help="with gradient_checkpointing, recompute every n-th block")  # fmt: skip
    flag("--recompute", choices=("all", "cheap"), default="all",
         help="of such a block: all of it, or all but products and attention")  # fmt: skip
    flag("--max-skipped", type=int, default=10, metavar="K",
         help="stop after K steps in a row that are not finite or jumped")  # fmt: skip
    flag("--spike", type=float, default=0.0, metavar="S",
         help="skip a step whose loss or gradient norm is S standard deviations too high; 0: none")  # fmt: skip
    flag("--peak-flops", type=float, metavar="F",
         help="operations a second of one GPU, for mfu; default: by the GPU's name")  # fmt: skip
    flag("--workers", type=int, default=0, metavar="N",
         help="processes that read data ahead, beside each training process; 0: a thread")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
