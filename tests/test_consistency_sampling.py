"""The consistency sampler by closed forms, and how a checkpoint's objective decides what may be painted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from full_forward import Double
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlx_transfusion import interleave, model_path, noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Painted, Step, Token
from mlx_transfusion.generation import complete, describe, generate_images, paint
from mlx_transfusion.images import read_record, save_png
from mlx_transfusion.model_io import Loaded, load, save_model
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.objective import read_objective
from mlx_transfusion.records import settings_from_record
from mlx_transfusion.sampling import SAMPLERS, check_angles, middle_angles
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import SampleConfig
from mlx_transfusion.training.preview import paint_grid
from mlx_transfusion.trigflow import NOISE_ANGLE, velocity_from_x0

Cli = Callable[..., Any]
OBJECTIVE = {
    "name": "consistency", "method": "scd", "teacher": "0123456789abcdef", "guidance": 3.0, "angles": [1.0],
}  # fmt: skip
STUDENT = {"objective": OBJECTIVE}
UNGUIDED = {"objective": {"name": "consistency", "method": "sct"}}
consistency = SAMPLERS["consistency"].function


# ---- closed forms ----

MEAN, STD = 0.7, 0.4


def exact_network(x: Any, a: float, mean: float = MEAN, std: float = STD) -> Any:
    """F whose f = cos(a) x - sin(a) F is the exact flow map of data N(mean, std^2)."""
    spread = math.sqrt((std * math.cos(a)) ** 2 + math.sin(a) ** 2)
    return velocity_from_x0(x, mean + std / spread * (x - math.cos(a) * mean), a)


def keyed(seeds: list[int], shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    return lambda step: np.stack([noise.normal(seed, step, shape, "step") for seed in seeds])


def run_angles(steps: int) -> list[float]:
    return [NOISE_ANGLE, *middle_angles(steps), 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_a_gaussian_have_its_mean_and_spread(steps: int) -> None:
    count = 40_000
    x = noise.normal(1, 0, count).astype(np.float64)
    found = consistency(
        exact_network, x, run_angles(steps), lambda i: noise.normal(2, i, count).astype(np.float64)
    )
    assert abs(found.mean() - MEAN) < 5 * STD / math.sqrt(count)
    assert abs(found.std() / STD - 1) < 5 / math.sqrt(2 * count)
    if steps == 1:
        np.testing.assert_allclose(found, MEAN + STD * x, atol=1e-12)  # the flow map itself


def test_one_step_is_exact_for_data_of_one_point_and_draws_no_noise() -> None:
    x = np.linspace(-2, 2, 5)
    found = consistency(lambda x, a: exact_network(x, a, std=0.0), x, [NOISE_ANGLE, 0.0])
    np.testing.assert_allclose(found, MEAN, atol=1e-15)


@hypothesis_settings(deadline=None)
@given(b=st.floats(0.05, 1.5), x=st.floats(-3, 3), z=st.floats(-3, 3), v=st.floats(-3, 3))
def test_two_steps_by_hand(b: float, x: float, z: float, v: float) -> None:
    """A network that always gives v: x0 = -v, then cos(b) x0 + sin(b) z, then its estimate of the data."""
    states: list[tuple[float, float]] = []
    found = consistency(
        lambda x, a: v, x, [NOISE_ANGLE, b, 0.0], lambda i: z, lambda i, n, x, x0: states.append((x, x0))
    )
    between = -math.cos(b) * v + math.sin(b) * z
    assert states[0] == pytest.approx((between, -v), abs=1e-12)
    assert found == pytest.approx(math.cos(b) * between - math.sin(b) * v, abs=1e-12)


def test_a_picture_of_a_batch_equals_it_alone_bit_for_bit() -> None:
    def draw(seeds: list[int]) -> np.ndarray:
        x = np.stack([noise.normal(seed, 0, (4, 3), "start") for seed in seeds])
        return consistency(exact_network, x, run_angles(4), keyed(seeds, (4, 3)))

    together = draw([3, 1, 2, 9])
    for row, seed in enumerate([3, 1, 2, 9]):
        np.testing.assert_array_equal(together[row], draw([seed])[0])


def test_several_steps_without_noise_is_one_line() -> None:
    with pytest.raises(UserError, match="draws noise between its steps"):
        consistency(exact_network, np.zeros(2), run_angles(2))


def test_middle_angles() -> None:
    assert middle_angles(1) == ()
    assert middle_angles(2) == (1.1,)
    assert middle_angles(3) == pytest.approx((1.1, 0.55))
    assert middle_angles(4) == pytest.approx((1.1, 2.2 / 3, 1.1 / 3))
    assert middle_angles(3, 0.8) == pytest.approx((0.8, 0.4))
    for steps in range(1, 40):
        check_angles(run_angles(steps))
        assert len(run_angles(steps)) == steps + 1
    with pytest.raises(UserError, match="steps is 0"):
        middle_angles(0)
    with pytest.raises(UserError, match="first middle angle"):
        middle_angles(3, 1.7)


# ---- what the objective decides ----


def resolved(extra: dict[str, Any], **change: Any) -> tuple[Any, ...]:
    s = GenerationSettings(**change).for_model(extra, "m")
    return s.sampler, s.steps, s.angles, s.guidance


def test_defaults_of_either_kind() -> None:
    assert resolved({}) == ("dpmpp_2m", 25, None, 3.0)
    assert resolved({"objective": {"name": "diffusion"}}) == ("dpmpp_2m", 25, None, 3.0)
    assert resolved({}, sampler="ddpm", guidance=1.0) == ("ddpm", 250, None, 1.0)
    assert resolved(STUDENT) == ("consistency", 2, (1.0,), 1.0)
    assert resolved(UNGUIDED) == ("consistency", 2, (1.1,), 1.0)
    assert resolved(UNGUIDED, guidance=2.0) == ("consistency", 2, (1.1,), 2.0)


def test_steps_and_angles_of_a_consistency_model() -> None:
    assert resolved(STUDENT, steps=1) == ("consistency", 1, (), 1.0)
    assert resolved(STUDENT, steps=2) == ("consistency", 2, (1.0,), 1.0)
    assert resolved(STUDENT, steps=3) == ("consistency", 3, (1.0, 0.5), 1.0)  # the rule, from its own first
    assert resolved(STUDENT, angles=(1.2, 0.9)) == ("consistency", 3, (1.2, 0.9), 1.0)
    assert resolved(STUDENT, angles=()) == ("consistency", 1, (), 1.0)
    one_step = {"objective": OBJECTIVE | {"angles": []}}
    assert resolved(one_step) == ("consistency", 1, (), 1.0)
    assert resolved(one_step, steps=2) == ("consistency", 2, (1.1,), 1.0)


@pytest.mark.parametrize("extra", [{}, STUDENT, UNGUIDED])
def test_resolved_settings_stay_as_they_are(extra: dict[str, Any]) -> None:
    once = GenerationSettings(steps=3, negative_prompt="").for_model(extra, "m")
    assert once.for_model(extra, "m") == once.resolve() == once


def test_without_an_objective_the_sampler_decides() -> None:
    """`painting.paint` of a bare model: it may be of either kind."""
    assert GenerationSettings().resolve() == GenerationSettings().for_model({}, "m")
    assert GenerationSettings(sampler="consistency").resolve() == GenerationSettings().for_model(
        UNGUIDED, "m"
    )


@pytest.mark.parametrize(
    ("extra", "change", "message"),
    [
        ({}, {"sampler": "consistency"}, "model m is a diffusion model, and the consistency sampler needs"),
        ({}, {"angles": (1.1,)}, "model m is a diffusion model, and angles are for a consistency model"),
        (STUDENT, {"sampler": "ddim"}, "model m is a consistency model .* sampler 'ddim' .* 'consistency'"),
        (STUDENT, {"guidance": 2.5}, "model m has guidance 3 baked in, and guidance 2.5 cannot"),
        (STUDENT, {"negative_prompt": "cat"}, "model m paints without a second pass .* negative prompt"),
        (UNGUIDED, {"negative_prompt": "cat"}, "model m paints without a second pass .* negative prompt"),
        (STUDENT, {"spacing": "karras"}, "spacing 'karras' is for diffusion samplers"),
        (STUDENT, {"sampler": "consistent"}, "model m is a consistency model"),
        (STUDENT, {"steps": 0}, "steps is 0"),
        ({"objective": {"name": "rectified"}}, {}, 'model m: config.json: objective.name is "rectified"'),
        ({"objective": {"name": 3}}, {}, "model m: config.json: objective: name: expected str, found 3"),
        ({"objective": "scd"}, {}, "model m: config.json: objective: expected a table"),
        ({"objective": OBJECTIVE | {"angles": [0.5, 1]}}, {}, "config.json: objective.angles 0.5,1: use rad"),
        ({"objective": OBJECTIVE | {"angles": ["x"]}}, {}, r"objective: angles\[0\]: expected float"),
        ({"objective": OBJECTIVE | {"guidance": "3"}}, {}, "objective: guidance: expected float"),
    ],
)
def test_what_a_model_cannot_paint_with(extra: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GenerationSettings(**change).for_model(extra, "m")
    assert "\n" not in str(error.value)


def test_objectives_may_hold_what_painting_does_not_need() -> None:
    more = OBJECTIVE | {"weighting": "on"}
    assert read_objective({"objective": more}, "m") == read_objective(STUDENT, "m")


# ---- painting with a model ----


@pytest.fixture(scope="module")
def student_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> Path:
    folder = tmp_path_factory.mktemp("students") / "student"
    return save_model(folder, tiny_model, tiny_tokenizer, extra=STUDENT)


@pytest.fixture(scope="module")
def student(student_dir: Path) -> Loaded:
    return load(student_dir)


class Counting(Double):
    """A model whose passes are counted: rows and angle of each."""

    def __init__(self, model: Transfusion) -> None:
        super().__init__(model)
        self.passes: list[tuple[int, float]] = []

    def velocity(self, x: mx.array, angle: mx.array, cache: KVCache) -> mx.array:
        self.passes.append((len(x), round(float(angle[0]), 6)))
        return self.model.velocity(x, angle, cache)


@pytest.mark.parametrize(("steps", "angles"), [(1, []), (2, [1.0]), (3, [1.0, 0.5])])
def test_each_step_is_one_pass_of_one_row(
    student: Loaded, steps: int, angles: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counting(student.model)
    chosen = GenerationSettings(steps=steps).for_model(student.extra, student.name)
    paint(model, [[1, 10, 4]], [1], chosen)  # type: ignore[arg-type]
    assert model.passes == [(1, round(a, 6)) for a in (NOISE_ANGLE, *angles)]


def test_painting_by_hand(student: Loaded) -> None:
    """Two steps of the whole way: keyed noise, jump, keyed noise, jump, and the picture's own bytes."""
    prompt, seed = "red heart", 7
    c, model = student.config, student.model
    _, cache = model.prefill(
        np.array([[c.bos_token_id, *student.tokenizer.encode(prompt), c.boi_token_id]], np.int32),
        np.array([2 + len(student.tokenizer.encode(prompt))], np.int32),
    )
    shape = (c.patches_per_image, c.patch_dim)

    def jump(x: np.ndarray, a: float) -> np.ndarray:
        F = np.array(model.velocity(mx.array(x), mx.array([a]), cache))
        return math.cos(a) * x - math.sin(a) * F

    x0 = jump(noise.normal(seed, 0, shape, "generate/start")[None], NOISE_ANGLE)
    x = math.cos(1.0) * x0 + math.sin(1.0) * noise.normal(seed, (0, 0), shape, "generate/step")[None]
    pixels = np.array(model.decode(mx.array(jump(x.astype(np.float32), 1.0).astype(np.float32))))[0]
    found = generate_images(student, prompt, seed)[0]
    assert abs(found.pixels.astype(int) - np.round(pixels * 255)).max() <= 1


def test_a_batch_of_four_equals_one_by_one(student: Loaded) -> None:
    prompts, seeds = ["red heart", "moon", "big dog", "blue star cat"], [4, 4, 8, 9]
    chosen = GenerationSettings(steps=3)
    together = generate_images(student, prompts, seeds, dataclasses.replace(chosen, batch_size=4))
    for image, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = generate_images(student, prompt, seed, chosen)[0]
        assert abs(alone.pixels.astype(int) - image.pixels).max() <= 1
    one, two = (generate_images(student, "moon", 4, GenerationSettings(steps=n))[0].pixels for n in (1, 2))
    assert abs(one.astype(int) - two).max() > 3  # the second step draws noise of its own


def test_eps_networks_start_where_eps_is_of_use(tiny_config: Any, make_model: Any) -> None:
    """At pi/2 their velocity fades to 0, and with it the picture."""
    model = Counting(make_model(dataclasses.replace(tiny_config, prediction="epsilon")))
    paint(model, [[1, 10, 4]], [1], GenerationSettings(sampler="consistency"))  # type: ignore[arg-type]
    assert [a for _, a in model.passes] == pytest.approx([0.999 * NOISE_ANGLE, 1.1], abs=1e-6)


def test_guidance_of_an_unguided_consistency_model_takes_two_rows(tiny_model: Transfusion) -> None:
    model = Counting(tiny_model)
    chosen = GenerationSettings(guidance=2.0).for_model(UNGUIDED, "m")
    paint(model, [[1, 10, 4]], [1], chosen)  # type: ignore[arg-type]
    assert [rows for rows, _ in model.passes] == [2, 2]


def test_errors_come_before_anything_is_painted(
    student: Loaded, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_transfusion.text_to_image.paint", lambda *_, **__: pytest.fail("painted"))
    with pytest.raises(UserError, match="model student is a consistency model"):
        generate_images(student, "moon", 1, GenerationSettings(sampler="heun"))
    with pytest.raises(UserError, match="model student is a consistency model"):
        complete(student, "moon", 1, GenerationSettings(sampler="heun"))
    with pytest.raises(UserError, match="model tiny is a diffusion model"):
        generate_images(load(tiny_model_dir), "moon", 1, GenerationSettings(sampler="consistency"))


def test_records_hold_concrete_values_and_repeat(student: Loaded) -> None:
    image = generate_images(student, "red heart", 5)[0]
    record = json.loads(json.dumps(image.settings))
    assert (record["sampler"], record["steps"], record["angles"], record["guidance"]) == (
        "consistency", 2, [1.0], 1.0,
    )  # fmt: skip
    assert record["objective"] == OBJECTIVE
    again = settings_from_record(record, "a.png")
    assert again.for_model(student.extra, "m") == DEFAULTS.for_model(student.extra, "m")
    np.testing.assert_array_equal(generate_images(student, "red heart", 5, again)[0].pixels, image.pixels)
    # Whatever the defaults of the checkpoint become, the picture's own settings repeat it.
    other = dataclasses.replace(student, extra={"objective": OBJECTIVE | {"angles": [0.3, 0.2]}})
    np.testing.assert_array_equal(generate_images(other, "red heart", 5, again)[0].pixels, image.pixels)
    damaged = image.settings | {"angles": ["x"]}
    with pytest.raises(UserError, match=r"a\.png: its settings are damaged"):
        settings_from_record(damaged, "a.png")


def test_after_a_picture_the_clean_one_is_read(student: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values that text continues from are those of the finished picture at angle 0."""
    tokens = iter([4, 10, 2])
    monkeypatch.setattr(interleave, "sample_token", lambda logits, **_: next(tokens))
    read: list[np.ndarray] = []
    extend_image = student.model.extend_image

    def spy(x0: mx.array, cache: KVCache) -> None:
        read.append(np.array(student.model.decode(x0)))
        extend_image(x0, cache)

    monkeypatch.setattr(student.model, "extend_image", spy)
    steps: list[Step] = []
    warm = GenerationSettings(temperature=1.0)  # the likeliest token is not sampled
    events = list(complete(student, "red heart", 7, warm, on_step=steps.append))
    (image,) = (event.image for event in events if isinstance(event, Painted))
    assert [(s.step, s.steps) for s in steps] == [(1, 2), (2, 2)]
    assert len(read) == 1
    assert abs(np.round(read[0][0] * 255) - image.pixels).max() <= 1
    np.testing.assert_array_equal(image.pixels, generate_images(student, "red heart", 7)[0].pixels)
    assert image.settings["angles"] == [1.0]
    assert image.settings["completion"]["picture"] == 0


def test_text_does_not_ask_for_a_sampler(student: Loaded, tiny_model_dir: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    chosen = GenerationSettings(max_tokens=6, sampler="ddim", guidance=2.0)
    assert describe(student, pixels, settings=chosen) == describe(
        load(tiny_model_dir), pixels, settings=chosen
    )
    writing = dataclasses.replace(chosen, max_images=0)
    assert any(isinstance(event, Token) for event in complete(student, "moon", 1, writing))


def test_training_previews_take_settings(student: Loaded, tmp_path: Path) -> None:
    config = SampleConfig(prompts=("red heart", "moon"), seed=3)
    files = {}
    for steps in (None, 1, 2):
        chosen = DEFAULTS if steps is None else GenerationSettings(steps=steps).for_model(STUDENT, "m")
        files[steps] = tmp_path / f"{steps}.png"
        paint_grid(student.model, student.tokenizer, config, files[steps], chosen)
    plain = tmp_path / "plain.png"
    paint_grid(student.model, student.tokenizer, config, plain)
    assert plain.read_bytes() == files[None].read_bytes()
    assert len({file.read_bytes() for file in files.values()}) == 3


# ---- the command line ----


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels_of(file: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(file))


def test_generate_end_to_end(cli: Cli, student_dir: Path, in_folder: Path) -> None:
    result = cli(
        "generate", "red heart", "--model", student_dir, "--seed", 3, "-n", 3, "--batch-size", 2, "--grid",
        "--json", "--preview-every", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    *rows, sheet = map(json.loads, result.out.splitlines())
    for row in rows:
        assert row["settings"] == read_record(row["file"])
        assert (row["settings"]["sampler"], row["settings"]["steps"]) == ("consistency", 2)
        name = row["file"].removesuffix(".png")
        first, last = (f"{name}_step_00{k}.png" for k in (1, 2))
        assert read_record(first) == row["settings"] | {"preview_step": 1}
        assert (pixels_of(first) != pixels_of(last)).any()
        np.testing.assert_array_equal(pixels_of(last), pixels_of(row["file"]))
        again = cli(
            "generate", "--from", row["file"], "--model", student_dir, "-o", "again.png", "--overwrite"
        )
        assert (again.code, again.out) == (0, "again.png\n")
        np.testing.assert_array_equal(pixels_of("again.png"), pixels_of(row["file"]))
        assert read_record("again.png") == row["settings"]
    assert [r["angles"] for r in read_record(sheet["file"])["pictures"]] == [[1.0]] * 3


def recorded(cli: Cli, *arguments: object) -> tuple[Any, ...]:
    result = cli("generate", *arguments)
    assert result.code == 0, result.err
    record = read_record(result.out.strip())
    return record["sampler"], record["steps"], record.get("angles"), record["guidance"]


def test_angles_and_steps_flags(cli: Cli, student_dir: Path, in_folder: Path) -> None:
    flags = ("--model", student_dir, "--seed", 3)
    assert recorded(cli, "moon", *flags, "--angles", "1.2,0.7") == ("consistency", 3, [1.2, 0.7], 1.0)
    assert recorded(cli, "moon", *flags, "--steps", 1) == ("consistency", 1, [], 1.0)
    assert recorded(cli, "moon", *flags, "--steps", 2, "--angles", "0.9") == ("consistency", 2, [0.9], 1.0)
    assert recorded(cli, "moon", *flags, "--guidance", 1) == ("consistency", 2, [1.0], 1.0)


def test_from_with_other_steps_and_angles(cli: Cli, student_dir: Path, in_folder: Path) -> None:
    """Steps and angles set each other: the flag wins over what the picture says."""
    flags = ("--from", "image.png", "--model", student_dir)
    recorded(cli, "moon", "--model", student_dir, "--seed", 3, "--angles", "0.9")
    assert recorded(cli, *flags) == ("consistency", 2, [0.9], 1.0)
    assert recorded(cli, *flags, "--steps", 2) == ("consistency", 2, [0.9], 1.0)
    assert recorded(cli, *flags, "--steps", 3) == ("consistency", 3, [1.0, 0.5], 1.0)
    assert recorded(cli, *flags, "--angles", "1.2,0.9,0.4") == ("consistency", 4, [1.2, 0.9, 0.4], 1.0)


def test_from_a_picture_of_the_other_kind(
    cli: Cli, student_dir: Path, tiny_model_dir: Path, in_folder: Path
) -> None:
    """The sampler of a diffusion picture is refused; naming the right one takes the model's own settings."""
    recorded(cli, "moon", "--model", tiny_model_dir, "--seed", 3, "--steps", 4, "--spacing", "karras")
    result = cli("generate", "--from", "image.png", "--model", student_dir)
    assert (result.code, result.out) == (2, "")
    assert "model student is a consistency model" in result.err
    flags = ("--from", "image.png", "--model", student_dir, "--sampler", "consistency")
    assert recorded(cli, *flags) == ("consistency", 2, [1.0], 1.0)
    assert read_record("image_1.png")["seed"] == 3
    back = ("--from", "image_1.png", "--model", tiny_model_dir, "--sampler", "dpmpp_2m", "--steps", 2)
    assert recorded(cli, *back) == ("dpmpp_2m", 2, None, 3.0)


def test_pictures_made_before_angles_were_recorded_repeat(
    cli: Cli, tiny_model_dir: Path, in_folder: Path
) -> None:
    """Their record: no "angles", no "objective"; it is still what a diffusion picture says."""
    loaded = load(tiny_model_dir)
    chosen = GenerationSettings(sampler="ddpm", steps=3, guidance=2.0)
    image = generate_images(loaded, "moon", 5, chosen)[0]
    old = {
        "version": "0.1.0", "model": "tiny", "model_hash": loaded.fingerprint, "prompt": "moon",
        "negative_prompt": "", "seed": 5, "steps": 3, "sampler": "ddpm", "spacing": "uniform",
        "guidance": 2.0, "guidance_interval": [0.0, math.pi / 2], "width": 8, "height": 8,
        "batch": {"size": 1, "row": 0},
    }  # fmt: skip
    save_png("old.png", image.pixels, old)
    assert cli("generate", "--from", "old.png", "--model", tiny_model_dir).out == "image.png\n"
    np.testing.assert_array_equal(pixels_of("image.png"), image.pixels)
    assert read_record("image.png") == old | {"version": read_record("image.png")["version"]}


@pytest.mark.parametrize(
    ("message", "student", "flags"),
    [
        ("model tiny is a diffusion model, and the consistency", False, ["--sampler", "consistency"]),
        ("model tiny is a diffusion model, and angles", False, ["--angles", "1.1"]),
        ("model student is a consistency model", True, ["--sampler", "ddim"]),
        ("model student has guidance 3 baked in", True, ["--guidance", 4]),
        ("2 angles make 3 steps, and steps is 5", True, ["--angles", "1.1,0.6", "--steps", 5]),
        ("angles 0.6,1.1: use radians that decrease", True, ["--angles", "0.6,1.1"]),
        ("angles 2: use radians", True, ["--angles", "2"]),
        ("--angles 1.1;0.6: use numbers with commas", True, ["--angles", "1.1;0.6"]),
        ("--angles : use numbers with commas", True, ["--angles", ""]),
        ("spacing 'karras' is for diffusion samplers", True, ["--spacing", "karras"]),
        ("negative prompt", True, ["--negative-prompt", "cat"]),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "complete"])
def test_flags_that_do_not_fit_the_model(
    cli: Cli, student_dir: Path, tiny_model_dir: Path, in_folder: Path, verb: str, message: str,
    student: bool, flags: list[object],
) -> None:  # fmt: skip
    result = cli(verb, "moon", "--model", student_dir if student else tiny_model_dir, *flags)
    assert (result.code, result.out, list(in_folder.iterdir())) == (2, "", [])
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_complete_end_to_end(
    cli: Cli, student_dir: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter([10, 4, 10, 2])
    monkeypatch.setattr("mlx_transfusion.interleave.sample_token", lambda logits, **_: next(tokens))
    flags = ("--seed", 2, "--angles", "0.8", "--temp", 1)
    result = cli("complete", "red heart", "--model", student_dir, *flags)
    assert "[image.png]" in result.out
    record = read_record("image.png")
    assert (record["sampler"], record["angles"], record["guidance"]) == ("consistency", [0.8], 1.0)


def test_info_shows_the_objective(cli: Cli, student_dir: Path, tiny_model_dir: Path, in_folder: Path) -> None:
    assert json.loads(cli("info", student_dir, "--json").out)["objective"] == OBJECTIVE
    assert json.loads(cli("info", tiny_model_dir, "--json").out)["objective"] == {"name": "diffusion"}
    lines = [line.split() for line in cli("info", student_dir).out.splitlines()]
    assert ["method", "scd"] in lines
    assert ["angles", "[1.0]"] in lines
    for folder, expected in ((student_dir, OBJECTIVE), (tiny_model_dir, {"name": "diffusion"})):
        cli("generate", "moon", "--model", folder, "--steps", 2, "--overwrite")
        facts = json.loads(cli("info", "image.png", "--json").out)
        assert facts["objective"] == expected
        assert facts["sampler"] == ("consistency" if folder == student_dir else "dpmpp_2m")


def test_bundled_names(
    cli: Cli, student_dir: Path, tmp_path: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is the folder of its name in the package, and missing ones are told by name."""
    package = tmp_path / "package"
    monkeypatch.setattr("mlx_transfusion.model_path.resources.files", lambda name: package)
    result = cli("generate", "moon", "--model", "emoji-2step", "--seed", 1)
    assert result.code == 2
    assert 'the bundled model "emoji-2step" is missing from this installation' in result.err
    shutil.copytree(student_dir, package / "bundled" / "emoji-2step")
    result = cli("generate", "moon", "--model", "emoji-2step", "--seed", 1)
    assert (result.code, result.out) == (0, "image.png\n")
    assert read_record("image.png")["model"] == "emoji-2step"
    assert 'the bundled model "emoji" is missing' in cli("generate", "moon", "--model", "emoji").err
    monkeypatch.setattr(model_path, "DEFAULT_MODEL", "emoji-2step")
    assert cli("generate", "moon", "--seed", 1, "--overwrite").code == 0
    assert read_record("image.png")["model"] == "emoji-2step"
    assert "or a bundled model: emoji, emoji-2step" in cli("generate", "moon", "--model", "nowhere").err
