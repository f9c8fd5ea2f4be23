"""What the tests of distillation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_transfusion.training.checkpoint import checkpoints
from mlx_transfusion.training.consistency_step import ConsistencyStep
from mlx_transfusion.training.trainer import Trainer

both_methods = pytest.mark.parametrize("method", ["scm", "ect", "scm_hops"])


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def step_of(trainer: Trainer) -> ConsistencyStep:
    assert isinstance(trainer.step, ConsistencyStep)
    return trainer.step


def stop_after(trainer: Trainer, steps: int) -> None:
    """Run and break off right after the checkpoint of step `steps`."""
    save = trainer._save

    def saving() -> Path:
        path = save()
        if trainer.state.step >= steps:
            raise RuntimeError("pulled the plug")
        return path

    trainer._save = saving  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="plug"):
        trainer.run()
    assert [c.name for c in checkpoints(trainer.output / "checkpoints")] == [f"step-{steps:08d}"]
