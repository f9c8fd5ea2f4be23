"""`python -m mlx_transfusion.torch.export CHECKPOINT FOLDER`: a distributed checkpoint -> a model folder for MLX.

Reads shards of any number of processes on one machine, bit for bit, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import SpecialIds, Tokenizer


def export(checkpoint: Path, target: Path, which: str = "average", tokenizer: str | None = None) -> Path:
    """Write the model of `checkpoint` (its "average" or its last "weights") as a model folder; returns its path.

    tokenizer: of the run, if it is no longer where the run's config says. Raises UserError for another `which`, for a
    checkpoint that is damaged and for an unwritable target.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    from mlx_transfusion.torch import folder
    from mlx_transfusion.torch.checkpoint import fault_of, read_record

    record = read_record(checkpoint)
    if fault := fault_of(checkpoint, record["files"]):
        raise UserError(f"{checkpoint}: damaged ({fault}): take the checkpoint before it")
    config = ModelConfig.from_dict(record["config"]["model_config"], f"{checkpoint}: model_config")
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tree = {
        which: {
            name.removeprefix(f"{which}."): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(f"{which}.") and not name.startswith(f"{which}.loss_weight.")
        }
    }
    if not tree[which]:
        raise UserError(f'{checkpoint}: has no "{which}": choose "average" or "weights"')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is wanted
        dcp.load(tree, checkpoint_id=checkpoint, no_dist=True)
    special = {n: getattr(config, f"{n}_token_id") for n in ("pad", "bos", "eos", "unk", "boi", "eoi")}
    words = Tokenizer.load(
        tokenizer or record["config"]["training"]["tokenizer"], special=SpecialIds(**special)
    )
    extra = record["config"].get("extra", {})
    return folder.save(target, config, tree[which], words, extra)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 after bad input (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="mlx_transfusion.torch.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--which", choices=("average", "weights"), default="average")
    parser.add_argument("--tokenizer", help="if it is no longer where the run's config says")
    given = parser.parse_args(arguments)
    try:
        print(export(given.checkpoint, given.folder, given.which, given.tokenizer))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
