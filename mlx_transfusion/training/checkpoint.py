"""Checkpoints: complete or absent.

A checkpoint is a folder `step-00001000` that any command can load as a model (config.json, model.safetensors with
the EMA weights, the tokenizer) and that also holds what an exact resume needs:

    train.safetensors      the weights being trained
    optimizer.safetensors  the optimiser's state
    state.json             step, seed and the training config

It is written under a temporary name, every file is flushed to disk, and the folder is renamed last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer

PREFIX, TEMPORARY = "step-", ".writing-"
WEIGHTS, AVERAGE, OPTIMIZER, STATE = (
    "train.safetensors",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
)


@dataclass
class TrainState:
    """Everything that changes during training; random draws follow from the step."""

    step: int
    weights: Any
    ema: Any


def save_checkpoint(
    folder: Path,
    state: TrainState,
    optimizer: optim.Optimizer,
    model: Transfusion,
    tokenizer: Tokenizer,
    record: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNNNN` atomically and remove all but the newest `keep`.

    `model` is only used for its shape of parameters; `record` (seed, training config) goes into state.json.
    Raises UserError when the disk is full or the folder cannot be written; older checkpoints stay as they are.
    """
    target = folder / f"{PREFIX}{state.step:08d}"
    temporary = folder / f"{TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
        model.update(state.ema)
        save_model(temporary, model, tokenizer)
        model.update(state.weights)
        mx.save_safetensors(str(temporary / WEIGHTS), dict(tree_flatten(state.weights)))
        mx.save_safetensors(str(temporary / OPTIMIZER), dict(tree_flatten(optimizer.state)))
        (temporary / STATE).write_text(json.dumps({"step": state.step, **record}, indent=2) + "\n")
        for file in temporary.iterdir():
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise UserError(
            f"{target}: cannot save the checkpoint ({'disk full' if full else error}); "
            "free some space and resume: the last complete checkpoint is untouched"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and (p / STATE).is_file())


def read_record(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError when it cannot be read."""
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE}: cannot read the training state: {error}") from error


def load_checkpoint(checkpoint: Path, optimizer: optim.Optimizer) -> TrainState:
    """Restore weights, EMA and step; the optimiser's state is set in place.

    Raises UserError for a file that is missing or corrupt.
    """
    try:
        weights = _tree(checkpoint / WEIGHTS)
        ema = _tree(checkpoint / AVERAGE)
        optimizer.state = _tree(checkpoint / OPTIMIZER)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be resumed from: {error}") from error
    mx.eval(weights, ema, optimizer.state)
    return TrainState(int(read_record(checkpoint)["step"]), weights, ema)


def _tree(file: Path) -> Any:
    return tree_unflatten(list(mx.load(str(file)).items()))


def _remove_unfinished(folder: Path) -> None:
    """A run that was killed while saving leaves a temporary folder; it is of no use to anyone."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _flush(path: Path) -> None:
    """Wait until the file or folder is on the disk, so that a power cut cannot leave a renamed empty one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
