"""A model's own way to paint: the "generation" table of config.json."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_transfusion.errors import UserError
from mlx_transfusion.sampling import get_sampler
from mlx_transfusion.settings import DIFFUSION_GUIDANCE, GenerationSettings

FLOW = {"generation": {"sampler": "ddim", "spacing": "flow", "steps": 30, "guidance": 2.0}}


def chosen(extra: dict[str, Any], **given: Any) -> tuple[Any, ...]:
    s = GenerationSettings(**given).for_model(extra, "m")
    return s.sampler, s.steps, s.spacing, s.guidance


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("ddim", 30, "flow", 2.0)),
        ({"steps": 4}, ("ddim", 4, "flow", 2.0)),
        ({"guidance": 1.0}, ("ddim", 30, "flow", 1.0)),
        ({"spacing": "karras"}, ("ddim", 30, "karras", 2.0)),
        ({"sampler": "ddim"}, ("ddim", 30, "flow", 2.0)),
        ({"sampler": "heun"}, ("heun", get_sampler("heun").default_steps, "uniform", 2.0)),
        ({"sampler": "heun", "steps": 5}, ("heun", 5, "uniform", 2.0)),
    ],
)
def test_flags_come_before_the_model(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert chosen(FLOW, **given) == expected


def test_without_a_table_the_package_decides() -> None:
    assert chosen({}) == ("dpmpp_2m", get_sampler("dpmpp_2m").default_steps, "uniform", DIFFUSION_GUIDANCE)
    assert chosen({"generation": {"guidance": 1.5}})[3] == 1.5


def test_a_student_does_not_paint_as_its_teacher() -> None:
    assert chosen(FLOW | {"objective": {"name": "consistency"}}) == ("consistency", 2, "uniform", 1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"samplers": "ddim"}, 'unknown key "samplers"; did you mean "sampler"'),
        ({"sampler": "dddim"}, "unknown sampler 'dddim'"),
        ({"steps": 0}, "model m: config.json: generation.steps is 0"),
        ({"steps": "many"}, "steps: expected int"),
        ({"spacing": "even"}, "spacing 'even'"),
        ({"guidance": float("nan")}, "guidance"),
        (3, "expected a table"),
    ],
)
def test_a_bad_table_is_one_clear_line(table: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        chosen({"generation": table})
    assert "\n" not in str(error.value)
