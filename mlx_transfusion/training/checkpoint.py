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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import read_weights, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer

Save = Callable[[Path, Transfusion, Tokenizer, Mapping[str, Any] | None], object]
"""(folder, model, tokenizer, extra tables): writes a model's own files."""

PREFIX, TEMPORARY = "step-", ".writing-"
WEIGHTS, OPTIMIZER, STATE = "train.safetensors", "optimizer.safetensors", "state.json"


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
    extra: Mapping[str, Any] | None = None,
    save: Save = save_model,
) -> Path:
    """Write `folder/step-NNNNNNNN` atomically and remove all but the newest `keep`.

    `model` is only used for its shape of parameters; `record` (seed, training config) goes into state.json, `extra`
    (tables such as "objective") into config.json. save: writes the model's own files, an adapter's for one.
    Raises UserError when the disk is full or the folder cannot be written; older checkpoints stay as they are.
    """
    target = folder / f"{PREFIX}{state.step:08d}"
    temporary = folder / f"{TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        # A step that is saved already stays: taking it away to write the same again would only risk it.
        if not (target / STATE).is_file():
            _write(temporary, state, optimizer, model, record, lambda to: save(to, model, tokenizer, extra))
            if target.exists():
                shutil.rmtree(target)  # not a checkpoint: it has no training state
            os.replace(temporary, target)
            _flush(folder)
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(
            f"{target}: cannot save the checkpoint ({_reason(error)}); "
            "free some space and resume: the last complete checkpoint is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(
    folder: Path,
    state: TrainState,
    optimizer: optim.Optimizer,
    model: Transfusion,
    record: dict[str, Any],
    save: Callable[[Path], object],
) -> None:
    """Write all files of a checkpoint into a new folder and wait until they are on the disk."""
    folder.mkdir()
    current = model.parameters()
    model.update(state.ema)
    try:
        save(folder)
    finally:
        model.update(current)
    mx.save_safetensors(str(folder / WEIGHTS), dict(tree_flatten(state.weights)))
    mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(optimizer.state)))
    (folder / STATE).write_text(json.dumps({"step": state.step, **record}, indent=2) + "\n")
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)


def _reason(error: BaseException) -> str:
    """Why a file could not be written, in few words."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    # mlx has no error numbers; its writes fail for want of space.
    full = getattr(error, "errno", None) == errno.ENOSPC or "Unable to write" in str(error)
    return "disk full" if full else getattr(error, "strerror", None) or str(error)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; under another name, so that a kill half-way leaves nothing that looks complete."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and (p / STATE).is_file())


def read_record(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: "step", "config" and what else was recorded.

    Raises UserError when it cannot be read.
    """
    try:
        record = json.loads((checkpoint / STATE).read_text())
        if not (isinstance(record["step"], int) and isinstance(record["config"], dict)):
            raise ValueError("step and config have the wrong types")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE}: cannot read the training state: {error}") from error
    return record


def read_model(checkpoint: Path) -> Any:
    """The weights that `save_model` wrote, as a tree."""
    return tree_unflatten(list(read_weights(checkpoint).items()))  # several files when the model is large


def load_checkpoint(
    checkpoint: Path, optimizer: optim.Optimizer, read: Callable[[Path], Any] = read_model
) -> TrainState:
    """Restore weights, EMA (what `read` gives) and step; the optimiser's state is set in place.

    Raises UserError for a file that is missing or corrupt.
    """
    step = read_record(checkpoint)["step"]
    try:
        weights = tree_unflatten(_arrays(checkpoint / WEIGHTS))
        ema = read(checkpoint)
        optimizer.state = tree_unflatten(_arrays(checkpoint / OPTIMIZER))
        mx.eval(weights, ema, optimizer.state)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be resumed from: {error}") from error
    return TrainState(step, weights, ema)


def _arrays(file: Path) -> list[tuple[str, mx.array]]:
    return list(mx.load(str(file)).items())  # type: ignore[union-attr]  # a dict, for safetensors


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
