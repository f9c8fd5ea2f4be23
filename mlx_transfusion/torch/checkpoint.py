"""Distributed checkpoints: complete or absent, checked when read, readable by any number of processes.

A checkpoint is a folder `step-00001000` of PyTorch's distributed format (a `.metadata` file and one or more
`__RANK_N.distcp` a process) with `state.json`: step, counts, training config, size and CRC-32 of every file. It is
written under a temporary name; state.json comes last; the folder is renamed when every process has finished. A folder
that fails its check is passed over for the one before it, and a line says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.faults import LOST, lost_process
from mlx_transfusion.torch.optimizer import Average

PREFIX, TEMPORARY, STATE = "step-", ".writing-", "state.json"
Tree = dict[str, dict[str, Tensor]]


@dataclass
class Progress:
    """Where a run stands; the random draws follow from the step."""

    step: int = 0
    updates: int = 0
    """Steps that changed the weights."""
    skipped: int = 0
    """Steps that were left out because something was not finite or jumped."""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """What a jump is measured against (`guard.Guard`)."""


def training_state(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: Average
) -> Tree:
    """All tensors of a run by kind and name, sharing their memory: to be saved, or to be read into."""
    return {
        "weights": {name: p.detach() for name, p in trained.items()},
        "average": average.values,
        "exp_avg": {name: optimizer.state[p]["exp_avg"] for name, p in trained.items()},
        "exp_avg_sq": {name: optimizer.state[p]["exp_avg_sq"] for name, p in trained.items()},
    }


class Saver:
    """Writes the checkpoints of one run; all processes call it together."""

    def __init__(self, folder: Path, keep: int, config: dict[str, Any], in_background: bool = False) -> None:
        """in_background: copy the state to memory and write it while training goes on."""
        self.folder, self.keep, self.config, self.in_background = folder, keep, config, in_background
        self._pending: tuple[Any, Callable[[], Path]] | None = None
        self._group = dist.new_group(backend="gloo") if in_background else None

    def save(self, tree: Tree, progress: Progress) -> Path:
        """Write `tree`, or begin to, and return the folder's final name.

        Raises UserError when the disk is full or the folder cannot be written; older checkpoints stay as they are.
        """
        self.finish()
        target = self.folder / f"{PREFIX}{progress.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{target.name}"
        self._together(lambda: self._prepare(temporary))
        if _agreed((target / STATE).is_file()):
            return target  # writing the same again would only risk it
        record = asdict(progress) | {"config": self.config, "world": dist.get_world_size()}
        try:
            if not self.in_background:
                dcp.save(tree, checkpoint_id=temporary)
                return self._complete(temporary, target, record)
            future = dcp.async_save(tree, checkpoint_id=temporary, process_group=self._group)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            raise UserError(_complaint(target, error)) from error
        self._pending = future, lambda: self._complete(temporary, target, record)
        return target

    @property
    def written(self) -> bool:
        """Whether this process has nothing left to write of a checkpoint that waits for `finish`."""
        return self._pending is None or self._pending[0].done()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for `finish`."""
        return self._pending is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name. Raises UserError as `save`."""
        if self._pending is None:
            return
        (future, complete), self._pending = self._pending, None
        try:
            future.result()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            raise UserError(_complaint(self.folder, error)) from error
        complete()

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left)
        temporary.mkdir()

    def _complete(self, temporary: Path, target: Path, record: dict[str, Any]) -> Path:
        """Check sums of all files, state.json, the final name; then old checkpoints go."""
        files = sorted(p for p in temporary.iterdir() if p.name != STATE)
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, {p.name: _checksum(p) for p in _share(files)})
        record["files"] = {name: value for part in sums for name, value in part.items()}

        def publish() -> None:
            (temporary / STATE).write_text(json.dumps(record, indent=2) + "\n")
            _flush(temporary / STATE)
            _flush(temporary)
            if target.exists():
                shutil.rmtree(target)  # not a checkpoint: it has no state
            os.replace(temporary, target)
            _flush(self.folder)
            for old in checkpoints(self.folder)[: -self.keep]:
                doomed = old.with_name(f"{TEMPORARY}old-{old.name}")
                os.replace(old, doomed)
                shutil.rmtree(doomed)

        self._together(publish)
        return target

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action` in the first process; all others wait, and all fail when it fails."""
        fault: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                fault[0] = _complaint(self.folder, error)
        dist.broadcast_object_list(fault)
        if fault[0] is not None:
            raise UserError(fault[0])


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first; whether their files are whole is another question."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and (p / STATE).is_file())


def read_record(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError when it cannot be read."""
    try:
        record = json.loads((checkpoint / STATE).read_text())
        if not (isinstance(record["step"], int) and isinstance(record["config"], dict)):
            raise TypeError("step and config have the wrong types")
        dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE}: cannot read the training state: {error}") from error
    return record


def fault_of(checkpoint: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with the first bad file of `files` (name -> [bytes, CRC-32]), or None."""
    for name, (size, crc) in sorted(files.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path)[1] != crc:
            return f"{name} does not have the check sum it was written with"
    return None


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its record; None when the folder has none at all.

    All processes call it together and share the reading. Raises UserError when there are checkpoints and all are bad.
    """
    found: list[list[str]] = [[str(p) for p in checkpoints(folder)] if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found)
    for path in map(Path, reversed(found[0])):
        fault = None
        record: dict[str, Any] = {}
        try:
            record = read_record(path)
            names = sorted(record["files"])
            fault = fault_of(path, {name: record["files"][name] for name in _share(names)})
        except UserError as error:
            fault = str(error)
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        worst = next((f for f in faults if f is not None), None)
        if worst is None:
            return path, record
        if dist.get_rank() == 0:
            print(f"{path}: damaged ({worst}): going back to the checkpoint before it", file=sys.stderr)
    if found[0]:
        raise UserError(
            f"{folder}: none of its {len(found[0])} checkpoints is whole: start again (--no-resume)"
        )
    return None


def restore(checkpoint: Path, tree: Tree) -> None:
    """Read a checkpoint into the tensors of `tree`, whatever number of processes wrote it. Raises UserError."""
    try:
        dcp.load(tree, checkpoint_id=checkpoint)
    except (OSError, RuntimeError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"{checkpoint}: cannot be resumed from: {error}") from error


def _share(items: list[Any]) -> list[Any]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _agreed(flag: bool) -> bool:
    """The first process's answer, for all."""
    answer = [flag]
    dist.broadcast_object_list(answer)
    return answer[0]


def _checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _complaint(target: Path, error: BaseException) -> str:
    if lost_process(error):
        return f"{target}: not saved: {LOST}"
    reason = (
        getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[-1]
    )
    return (
        f"{target}: cannot save the checkpoint ({reason}); free some space and resume: the last complete "
        "checkpoint is untouched"
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
