"""The best model of a run by validation, kept beside the checkpoints, and when to stop for want of a better one.

`OUTPUT/best` is a model folder (or an adapter) with the averaged weights of the best validation so far, and
`best.json` beside its files says which. What is best is also recorded in every checkpoint, so a run that was stopped
goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import write_json

FOLDER, TEMPORARY, RECORD = "best", ".writing-best", "best.json"


@dataclass(frozen=True)
class Best:
    """The lowest value so far of one number that validation gives."""

    metric: str
    """Name of the number, e.g. "valid_image_loss"; "" keeps no best."""
    patience: int = 0
    """Validations without a lower value after which the run stops; 0 never stops it."""
    step: int | None = None
    value: float | None = None
    since: int = 0
    """Validations since the best one."""

    @property
    def stop(self) -> bool:
        """Whether the run has waited long enough for a lower value."""
        return 0 < self.patience <= self.since

    def observe(self, step: int, values: Mapping[str, float]) -> Best:
        """The best after a validation at `step`.

        Raises UserError when validation does not give the number.
        """
        if not self.metric:
            return self
        if self.metric not in values:
            raise UserError(
                f'training config: best_by is "{self.metric}", expected one of {", ".join(sorted(values))}'
            )
        if self.value is None or values[self.metric] < self.value:
            return dataclasses.replace(self, step=step, value=values[self.metric], since=0)
        return dataclasses.replace(self, since=self.since + 1)

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"step": self.step, "value": self.value, "since": self.since}

    def restore(self, record: Mapping[str, Any] | None) -> Best:
        """Go on from what a checkpoint remembers; None is a checkpoint without a best."""
        return dataclasses.replace(self, **record) if record else self


def write_best(output: Path, best: Best, save: Callable[[Path], object]) -> Path:
    """Put what `save` writes into `output/best` in place of what was there. Raises UserError when it cannot.

    A run that is killed between both renames leaves no `best` until it is run on, never half of one.
    """
    target, temporary = output / FOLDER, output / TEMPORARY
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save(temporary)
        write_json(temporary / RECORD, {"metric": best.metric, **best.record()})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot save the best model: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
