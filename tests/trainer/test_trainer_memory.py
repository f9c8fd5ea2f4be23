"""Memory stays what it is, however long a run takes and however many pictures are painted."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from tiny_training import MakeConfig

from mlx_transfusion.model_io import load
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images
from mlx_transfusion.training.trainer import Trainer, train


def test_training_holds_no_more_after_sixty_steps_than_after_ten(config: MakeConfig) -> None:
    held: dict[int, int] = {}

    class Watched(Trainer):
        def _after_step(self, *rest: Any) -> None:
            super()._after_step(*rest)
            held[self.state.step] = mx.get_active_memory()

    Watched(config("steps=60", "save_every=1000")).run()
    assert max(held[n] for n in range(50, 61)) <= 1.01 * max(held[n] for n in range(5, 15))


def test_the_fortieth_picture_leaves_no_more_than_the_tenth(config: MakeConfig) -> None:
    loaded, held = load(train(config("steps=1"))), []
    for seed in range(40):
        generate_images(loaded, "red heart", seed, GenerationSettings(steps=2, guidance=2.0))
        held.append(mx.get_active_memory())
    assert max(held[30:]) <= 1.01 * max(held[5:10])
