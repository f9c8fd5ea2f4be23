"""Training metrics: one JSON object a line; TensorBoard when it is installed; Weights & Biases when it is asked for.

wandb sends what it logs to a server. So it is used when it is installed and its own variable WANDB_PROJECT is set,
and never otherwise; WANDB_MODE=offline keeps its files here.
"""

from __future__ import annotations

import json
import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError


class MetricsLog:
    """Appends to `metrics.jsonl`; on resume, lines past the resumed step are dropped, as those steps run again."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        """Raises UserError when `folder` cannot be made or written."""
        self.path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._drop_after(resumed_step)
        except OSError as error:
            raise UserError(f"{folder}: cannot write the training output: {error.strerror}") from error
        self._board = _tensorboard(folder, resumed_step)
        self._wandb = _wandb(folder)

    def _drop_after(self, step: int) -> None:
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log `values` at `step` (numbers; steps count from 1). Raises UserError when the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror}; training stopped") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Flush TensorBoard and wandb."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    """torch's writer, tensorboardX's, or None. torch takes seconds to import, and has none without tensorboard."""
    try:
        if find_spec("tensorboard") and find_spec("torch"):
            from torch.utils.tensorboard import SummaryWriter
        else:
            from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)


def _wandb(folder: Path) -> Any:
    """A wandb run, the same one after a resume, or None. It takes the project's name from WANDB_PROJECT itself."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError("WANDB_PROJECT is set, but wandb is not installed: pip install wandb") from error
    identity = folder / "wandb-id"
    if not identity.is_file():
        identity.write_text(uuid.uuid4().hex, encoding="utf-8")
    run = wandb.init(
        id=identity.read_text(encoding="utf-8"), name=folder.name, dir=str(folder), resume="allow"
    )
    # Its own counter only grows, while a resumed run repeats the steps behind its checkpoint.
    run.define_metric("*", step_metric="step")
    return run
