"""What `consistency.py` times: pairs of things on a student, its teacher and the data of a distillation."""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_transfusion import consistency
from mlx_transfusion.errors import UserError
from mlx_transfusion.lanes import lanes
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.model_path import resolve
from mlx_transfusion.painting import padded
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images, image_prefix
from mlx_transfusion.training.checkpoint import TrainState
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.data import Document
from mlx_transfusion.training.trainer import Trainer

STUDENT = "emoji-2step"
PROMPTS = (
    "red heart",
    "grinning face",
    "flag: france",
    "cat face",
    "rocket",
    "green apple",
    "pizza",
    "snowman",
)
PICTURES = 32
"""Of the first pair."""

VALUE, TANGENT = "value", "value and tangent"
DIFFUSION_STEP, DISTILLATION_STEP = "diffusion step", "distillation step"
TWO, SIXTEEN, MANY = "student, 2 steps", "teacher, 16 steps dpmpp_2m guided", "teacher, 250 steps ddpm guided"


@dataclass(frozen=True)
class Case:
    """Something to time, and how often in a round."""

    call: Callable[[], object]
    repeats: int
    warm_up: int = 1


def prepare(
    config_path: str, student_name: str | None, folder: str, quick: bool
) -> tuple[dict[str, Case], dict[str, Any]]:
    """The cases, and what they are measured on. Raises UserError for bad files. `folder` stays empty."""
    overrides = [f"output={folder}", *(["batch_size=8"] if quick else [])]
    config = load_train_config(config_path, overrides)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid=()))
    if config.consistency is None or config.consistency.teacher is None:
        raise UserError(f"{config_path}: has no teacher in a [consistency] table: give one of a distillation")
    distillation = Trainer(config)
    teacher = distillation.teacher
    assert teacher is not None
    student, stands_in = student_of(student_name, teacher)
    pictures = 4 if quick else PICTURES
    cases = (
        tangent_cases(student, pictures) | step_cases(distillation, config) | picture_cases(student, teacher)
    )
    return cases, {
        "device": str(mx.default_device()),
        "teacher": f"{teacher.name} ({teacher.fingerprint})",
        "student": f"{student.name} ({'weights of the teacher' if stands_in else student.fingerprint})",
        "pictures of value and tangent": pictures,
        "documents of a training step": config.batch_size,
    }


def student_of(name: str | None, teacher: Loaded) -> tuple[Loaded, bool]:
    """The student, and whether that is only the teacher under another name (there is no bundled one yet)."""
    if name is None:
        try:
            resolve(STUDENT)
        except UserError:
            return dataclasses.replace(teacher, extra={"objective": {"name": "consistency"}}), True
    return load(name or STUDENT), False


def tangent_cases(student: Loaded, pictures: int) -> dict[str, Case]:
    """The network of `pictures` states behind captions, with and without its derivative."""
    model = student.transfusion
    c = model.config
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)]
    ids, lengths = (mx.array(a) for a in padded([image_prefix(student, p) for p in prompts], c.pad_token_id))
    _, prefix = model.read_prefix(ids)
    shape, keys = (pictures, c.patches_per_image, c.patch_dim), mx.random.split(mx.random.key(0), 3)
    x, cos_velocity = (mx.random.normal(shape, key=key) for key in keys[:2])
    angle = mx.random.uniform(0.1, 1.5, (pictures,), key=keys[2])
    mx.eval(prefix, x, cos_velocity, angle)

    def network(y: mx.array, a: mx.array) -> mx.array:
        return model.paint(y, a, prefix, lengths)

    value = mx.compile(network)
    both = mx.compile(partial(consistency.value_and_derivative, network))
    return {
        VALUE: Case(lambda: evaluated(value(x, angle)), 10, 2),
        TANGENT: Case(lambda: evaluated(*both(x, angle, cos_velocity)), 10, 2),
    }


def evaluated(*arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays, computed: mlx would put it off."""
    mx.eval(*arrays)
    return arrays


def step_cases(distillation: Trainer, config: TrainConfig) -> dict[str, Case]:
    """Steps on the first documents of a distillation, from the same weights."""
    diffusion = Trainer(dataclasses.replace(config, consistency=None, init=config.start, model=None))
    documents = distillation.train_data.documents(0, config.batch_size)
    return {
        DIFFUSION_STEP: Case(StepCall(diffusion, documents), 3, 2),
        DISTILLATION_STEP: Case(StepCall(distillation, documents), 3, 2),
    }


class StepCall:
    """One optimiser step as the training loop takes it, on documents that are loaded once."""

    def __init__(self, trainer: Trainer, documents: Sequence[Document]) -> None:
        self.trainer, self.documents = trainer, documents
        step, data = trainer.step, trainer.train_data
        self.batch = step.load(data, documents)
        counts = [step.count(data, d) for d in documents]
        self.totals = sum(text for text, _ in counts), sum(pictures for _, pictures in counts)

    def __call__(self) -> None:
        """Gradients, update and moving average."""
        trainer, step, state = self.trainer, self.trainer.step, self.trainer.state
        with lanes(len(self.documents)):
            gradients, sums = step.gradients(state.weights, self.batch, *self.totals, state.step)
            mx.eval(gradients, sums)
            weights, ema, norm = step.update(gradients, state.weights, state.ema, trainer.config.ema)
            mx.eval(weights, ema, trainer.optimizer.state, norm)
        trainer.state = TrainState(state.step + 1, weights, ema)
        trainer.model.update(step.model_weights(weights))


def picture_cases(student: Loaded, teacher: Loaded) -> dict[str, Case]:
    """One picture at a time, at the default guidance. Raises UserError for a student that is none."""
    ways = {
        TWO: (student, GenerationSettings(sampler="consistency", steps=2), 10),
        SIXTEEN: (teacher, GenerationSettings(sampler="dpmpp_2m", steps=16), 3),
        MANY: (teacher, GenerationSettings(sampler="ddpm", steps=250), 1),
    }
    return {
        name: Case(
            partial(generate_images, loaded, PROMPTS[0], 0, settings.for_model(loaded.extra, loaded.name)),
            repeats,
        )
        for name, (loaded, settings, repeats) in ways.items()
    }
