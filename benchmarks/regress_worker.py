"""Worker of `regress.py`: times the package that PYTHONPATH puts first and prints one JSON object."""

from __future__ import annotations

import mlx_transfusion  # isort: skip  (before mlx, for which it loads a BLAS)

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import ours
from regress import SMALL, measure

from mlx_transfusion.model_io import load
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.text_to_image import generate_images


def cases() -> dict[str, Callable[[], object]]:
    """Models of random weights, and the bundled student."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = Transfusion(ours.model_config(SMALL))
    mx.eval(model.parameters())
    painter = Transfusion(ours.model_config(SMALL))
    mx.eval(painter.parameters())
    student = load("emoji-2step")
    ids = np.random.default_rng(0).integers(6, 2000, (1, 32)).astype(np.int32)

    def write() -> None:
        _, cache = painter.prefill(ids, np.array([32]))
        token = ids[:, :1]
        for _ in range(32):
            logits = painter.extend_text(token, np.ones(1, int), cache)
            token = np.array(mx.argmax(logits, -1), np.int32)[:, None]

    return {
        "training step": ours.Training(model, SMALL).step,
        "guided picture": lambda: ours.picture(painter, SMALL),
        "text": write,
        "student": lambda: generate_images(student, "red heart", 0),
    }


if __name__ == "__main__":
    if not Path(mlx_transfusion.__file__).is_relative_to(sys.argv[1]):
        sys.exit(f"error: measures {mlx_transfusion.__file__}, expected the package in {sys.argv[1]}")
    print(json.dumps(measure(cases())))
