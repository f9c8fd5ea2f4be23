"""Several runs of training, each by processes that are forked from this one, which loads PyTorch once for all.

python tests/torch_together.py '[[COUNT, ["CONFIG.toml", "--set", ...], "CODE THAT RUNS BEFORE"], ...]'
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence

import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import mlx_transfusion.torch.trainer  # noqa: F401
from mlx_transfusion.torch.train import main


def together(count: int, arguments: Sequence[str], before: str) -> None:
    """Train with `count` processes, whose ids are printed; ends this one when any of them fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                exec(before, {})
                code = main(arguments)
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    print(json.dumps(started), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    if any(codes):
        sys.exit(f"{count} processes {list(arguments)} ended with {codes}")


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        together(*job)
