"""The two-step model in the package: it paints nearly as its teacher, and reads and writes exactly as that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_transfusion.evaluation.config import Counts, load_config
from mlx_transfusion.evaluation.data import load_pairs
from mlx_transfusion.evaluation.measures import Split, measure_pictures
from mlx_transfusion.generation import generate_images
from mlx_transfusion.model_io import Loaded, flat_parameters, load
from mlx_transfusion.settings import DEFAULTS, GenerationSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def student() -> Loaded:
    return load("emoji-2step")


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    return load("emoji")


def test_it_is_the_default_and_takes_two_steps(student: Loaded) -> None:
    assert load().fingerprint == student.fingerprint
    chosen = DEFAULTS.for_model(student.extra, student.name)
    assert (chosen.sampler, chosen.steps, chosen.guidance) == ("consistency", 2, 1.0)


def test_it_reads_and_writes_with_its_teachers_weights(student: Loaded, teacher: Loaded) -> None:
    assert student.extra["objective"]["teacher"] == teacher.fingerprint
    ours, theirs = flat_parameters(student.model), flat_parameters(teacher.model)
    assert all(np.array_equal(np.array(ours[name]), np.array(value)) for name, value in theirs.items())
    assert {name for name in ours.keys() - theirs.keys() if not name.startswith("painter.")} == set()


@pytest.mark.parametrize("steps", [2, 1])
def test_it_paints_what_captions_say(student: Loaded, steps: int) -> None:
    folder = ROOT / "examples" / "emoji"
    config = load_config(folder / "evaluate.toml", folder / "data")
    generation = GenerationSettings(steps=steps, batch_size=24)
    config = replace(config, counts=Counts(pictures=24), generation=generation)
    pairs = load_pairs(config, config.train, student.config)
    report = measure_pictures(student, config, Split("train", pairs, pairs, 0), lambda done, total: None)
    # Of 1,000 captions it is more than half; 24 pictures scatter around that by a tenth.
    assert report["variant"]["rate"] >= 0.35


def test_two_steps_come_near_the_teachers_picture(student: Loaded, teacher: Loaded) -> None:
    prompts = ["red heart", "grinning face", "person walking", "flag: France"]
    near = [generate_images(m, prompts, 3) for m in (student, teacher)]
    pixels = [np.stack([image.pixels for image in images]).astype(float) / 255 for images in near]
    other = pixels[1][[1, 2, 3, 0]]
    assert ((pixels[0] - pixels[1]) ** 2).mean() < 0.3 * ((other - pixels[1]) ** 2).mean()
