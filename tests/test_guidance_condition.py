"""A consistency student that is told the guidance scale: the layer, the objective, the loop, painting."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from full_forward import Double
from mlx.utils import tree_flatten
from tiny_training import MakeConfig, state, write_run

from mlx_transfusion import consistency, noise, trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.gates import silu
from mlx_transfusion.models.patches import AngleEmbedding
from mlx_transfusion.models.transfusion import Transfusion, with_painter
from mlx_transfusion.objective import read_objective
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.checkpoint import checkpoints
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.consistency_step import ConsistencyStep
from mlx_transfusion.training.prefix_arrays import arrays_of
from mlx_transfusion.training.prefix_data import GUIDANCE_STREAM, prefix_of
from mlx_transfusion.training.trainer import Trainer, train

TABLE = """
[consistency]
teacher = "teacher"
adaptive_weight = true
guidance = 2.0
guidance_range = [1.0, 4.0]
tangent_warmup = 0
valid_pictures = 3

[data]
caption_drop = 0.2

[[data.valid]]
rows = "pairs.jsonl"
images = "pictures"
"""
OBJECTIVE = {"name": "consistency", "method": "scd", "guidance": 2.0, "guidance_range": [1.0, 4.0]}
STUDENT = {"objective": OBJECTIVE}
UNET = {"patch_encoder": "unet", "unet_channels": 8, "unet_blocks": 1}
LAYER = "angle_embedding.guidance"
LENGTHS = mx.array([3, 2, 3])
MakeModel = Callable[..., Transfusion]
students = pytest.mark.parametrize("student", ["full", "painter"])


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, make_model: MakeModel
) -> Path:
    """Data, a random teacher in `teacher`, whose guidance matters, and `distill.toml`."""
    folder = tmp_path_factory.mktemp("condition")
    toml = write_run(folder, tiny_tokenizer)
    text = toml.read_text()
    before, shape = text.split("[model]")
    begin = load_train_config(toml)
    model = Trainer(dataclasses.replace(begin, output=str(folder / "unused"))).model
    save_model(folder / "teacher", make_model(model.config, scale=0.1), tiny_tokenizer)
    (folder / "distill.toml").write_text(before + TABLE + shape[shape.index("[[data.train]]") :])
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> MakeConfig:
    def make(*overrides: str, output: str = "students") -> TrainConfig:
        return load_train_config(folder / "distill.toml", [f"output={tmp_path / output}", *overrides])

    return make


@pytest.fixture(params=["linear", "unet", "painter"])
def conditioned(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: MakeModel
) -> Transfusion:
    """A random model that is told the scale, of each kind."""
    change: dict[str, Any] = {"linear": {}, "unet": UNET, "painter": {"painter": True}}[request.param]
    return make_model(dataclasses.replace(tiny_config, guidance_condition=True, **change))


def names(model: Transfusion) -> set[str]:
    return {name for name, _ in tree_flatten(model.parameters())}


def states(model: Transfusion, rows: int = 3) -> mx.array:
    shape = (rows, model.config.patches_per_image, model.config.patch_dim)
    return mx.random.normal(shape, key=mx.random.key(3))


def read(model: Transfusion) -> KVCache:
    """The keys and values of LENGTHS tokens."""
    return model.prefill(np.array([[1, 10, 4], [1, 4, 0], [1, 11, 4]]), np.array(LENGTHS))[1]


# ---- the layer ----


def test_without_the_condition_nothing_is_different(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Names, first weights and numbers are those of a config that does not know it; so old folders load."""
    old = {key: value for key, value in tiny_config.to_dict().items() if key != "guidance_condition"}
    assert ModelConfig.from_dict(old) == tiny_config
    models = []
    for on in (False, True):
        mx.random.seed(5)
        models.append(Transfusion(dataclasses.replace(tiny_config, guidance_condition=on)))
    plain, told = models
    assert names(told) - names(plain) == {f"{LAYER}.weight", f"{LAYER}.bias"}
    embedding = plain.angle_embedding
    angle = mx.array([0.0, 0.4, 1.5])
    waves = angle[:, None] * embedding._frequencies
    hidden = embedding.fc1(mx.concatenate([mx.cos(waves), mx.sin(waves)], -1))
    assert mx.array_equal(embedding(angle), embedding.fc2(silu(hidden)))
    with pytest.raises(AttributeError, match="guidance"):
        embedding(angle, angle)


@pytest.mark.parametrize("change", [{}, UNET, {"painter": True}], ids=["linear", "unet", "painter"])
def test_the_layer_starts_as_if_it_were_not_there(
    tiny_config: ModelConfig, make_model: MakeModel, change: dict[str, Any]
) -> None:
    plain = make_model(dataclasses.replace(tiny_config, **change))
    told = Transfusion(dataclasses.replace(plain.config, guidance_condition=True))
    told.update(plain.parameters())
    owner = "painter." if change.get("painter") else ""
    assert names(told) - names(plain) == {f"{owner}{LAYER}.weight", f"{owner}{LAYER}.bias"}
    x, angle = states(plain), mx.array([0.1, 0.9, 1.5])
    got = told.velocity(x, angle, read(told), mx.array([1.0, 3.0, 7.5]))
    assert mx.array_equal(got, plain.velocity(x, angle, read(plain)))


def test_every_row_is_told_its_own_scale(conditioned: Transfusion) -> None:
    model, x, angle = conditioned, states(conditioned), mx.array([0.3, 0.9, 1.5])
    scale = mx.array([1.0, 2.5, 4.0])
    both = model.velocity(x, angle, read(model), scale)
    other = model.velocity(x, angle, read(model), mx.array([1.0, 2.5, 1.5]))
    np.testing.assert_allclose(both[:2], other[:2], atol=1e-5)
    assert mx.abs(both[2] - other[2]).max().item() > 1e-2
    alone = model.velocity(x[1:2], angle[1:2], read(model).select([1]), scale[1:2])
    np.testing.assert_allclose(alone[0], both[1], atol=1e-4)
    _, prefix = model.read_prefix(mx.array([[1, 10, 4], [1, 4, 0], [1, 11, 4]]))
    np.testing.assert_allclose(model.paint(x, angle, prefix, LENGTHS, scale), both, atol=1e-4)


def test_derivative_equals_central_differences(conditioned: Transfusion) -> None:
    """The scale is constant along a trajectory; a tangent of its own would show here."""
    model, x = conditioned, states(conditioned)
    angle, scale, h = mx.array([0.3, 0.8, 1.3]), mx.array([1.0, 2.5, 4.0]), 5e-3
    v = mx.random.normal(x.shape, key=mx.random.key(4))
    _, prefix = model.read_prefix(mx.array([[1, 10, 4], [1, 4, 0], [1, 11, 4]]))

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, prefix, LENGTHS, scale)

    a = angle[:, None, None]
    found = consistency.value_and_derivative(network, x, angle, mx.cos(a) * v).derivative

    def at(turn: float) -> mx.array:
        return network(trigflow.rotate(x, v, a, a + turn), angle + turn)

    wanted = np.array(mx.sin(a) * mx.cos(a) * (at(h) - at(-h)) / (2 * h))
    assert np.linalg.norm(wanted) > 1e-2
    assert np.linalg.norm(np.array(found) - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_the_embedding_of_the_scale_is_constant_in_the_angle(tiny_config: ModelConfig) -> None:
    embedding = AngleEmbedding(tiny_config, guidance=True)
    embedding.guidance.weight = mx.random.normal(embedding.guidance.weight.shape, key=mx.random.key(1))
    angle, scale = mx.array([0.2, 1.1]), mx.array([1.5, 3.0])
    _, (told,) = mx.jvp(lambda a: embedding(a, scale), [angle], [mx.ones((2,))])
    _, (plain,) = mx.jvp(embedding, [angle], [mx.ones((2,))])
    assert mx.array_equal(told, plain)
    assert mx.abs(embedding(angle, scale) - embedding(angle)).max().item() > 0.1


def test_a_painter_beside_a_model_that_is_told_the_scale(conditioned: Transfusion) -> None:
    """It takes the layer over; what reads has none."""
    model = with_painter(conditioned) if not conditioned.config.painter else conditioned
    assert {n for n in names(model) if LAYER in n} == {f"painter.{LAYER}.weight", f"painter.{LAYER}.bias"}
    x, angle, scale = states(model), mx.array([0.1, 0.9, 1.5]), mx.array([1.0, 3.0, 4.0])
    same = conditioned.velocity(x, angle, read(conditioned), scale)
    assert mx.array_equal(model.velocity(x, angle, read(model), scale), same)


# ---- distillation ----


@students
def test_a_student_starts_as_its_teacher(config: MakeConfig, student: str) -> None:
    trainer = Trainer(config(f"consistency.student={student}"))
    assert trainer.model.config.guidance_condition
    assert trainer.teacher is not None
    p, _ = arrays_of(trainer._load(0).parts[0], trainer.model)
    assert p.guidance is not None
    _, prefix = trainer.model.read_prefix(p.ids)
    ours = trainer.model.paint(p.x, p.angle, prefix, p.lengths, p.guidance)
    assert mx.array_equal(ours, trainer.teacher.model.paint(p.x, p.angle, prefix, p.lengths))


def test_the_teacher_guides_each_picture_with_its_own_scale(config: MakeConfig) -> None:
    trainer = Trainer(config())
    assert isinstance(trainer.step, ConsistencyStep)
    assert trainer.teacher is not None
    p, _ = arrays_of(trainer._load(0).parts[0], trainer.model)
    assert p.guidance is not None
    found = np.array(trainer.step._cos_velocity(p))
    documents = [d for d in trainer.train_data.documents(0, 6) if prefix_of(d) is not None]
    assert len(documents) > 1
    scales = []
    for row, d in enumerate(documents):
        scales.append(1.0 + 3.0 * float(noise.uniform(0, d.number, (), GUIDANCE_STREAM)))
        assert p.guidance[row].item() == pytest.approx(scales[-1])
        teacher, x, angle = trainer.teacher.model, p.x[row : row + 1], p.angle[row : row + 1]

        def alone(ids: list[int]) -> np.ndarray:
            cache = teacher.prefill(np.array([ids]), np.array([len(ids)]))[1]  # noqa: B023
            return np.array(mx.cos(angle)[:, None, None] * teacher.velocity(x, angle, cache))[0]  # noqa: B023

        null = alone([1, 4])
        wanted = null + scales[-1] * (alone(prefix_of(d) or []) - null)
        np.testing.assert_allclose(found[row], wanted, atol=2e-4)
    assert len(set(scales)) == len(scales)


def test_a_scale_belongs_to_its_document(config: MakeConfig) -> None:
    """Not to its place in a batch or part, nor to what else is drawn for it."""
    whole, parts = Trainer(config()), Trainer(config("accumulate=3"))
    (batch,) = whole._load(1).parts
    assert batch.guidance is not None
    found = batch.guidance[batch.weight > 0]
    pieces = [part.guidance[part.weight > 0] for part in parts._load(1).parts]
    assert sorted(np.concatenate(pieces)) == sorted(found)
    assert ((found >= 1) & (found < 4)).all()
    assert not set(found) & set(whole._load(2).parts[0].guidance)
    fixed = Trainer(config("consistency.guidance_range=[1.9, 2.1]"))._load(1).parts[0]
    assert np.array_equal(fixed.pictures.noise, batch.pictures.noise)
    assert np.array_equal(fixed.pictures.angle, batch.pictures.angle)


@students
def test_two_scales_paint_two_pictures_after_training(config: MakeConfig, student: str) -> None:
    run = config(f"consistency.student={student}", "optimizer.learning_rate=1e-2", "valid_every=6",
                 "sample.every=6", 'sample.prompts=["red star"]')  # fmt: skip
    loaded = load(train(run))
    assert loaded.config.guidance_condition
    assert loaded.extra["objective"]["guidance"] == 2.0
    assert loaded.extra["objective"]["guidance_range"] == [1.0, 4.0]
    layer = dict(tree_flatten(loaded.model.parameters()))[
        f"painter.{LAYER}.weight" if student == "painter" else f"{LAYER}.weight"
    ]
    assert mx.abs(layer).max().item() > 1e-3
    chosen = [
        GenerationSettings(guidance=scale).for_model(loaded.extra, "m") for scale in (1.0, 4.0, 2.0, None)
    ]
    pictures = [np.array(paint(loaded.model, [[1, 10, 4]], [3], settings)) for settings in chosen]
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-2
    assert np.array_equal(pictures[2], pictures[3])
    rows = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    assert "valid_teacher_gap_1" in rows[-1]
    settings = read_record(Path(run.output) / "samples" / "step-00000006.png")["rows"]
    assert [row["guidance"] for row in settings] == [2.0, 2.0, 2.0]


@students
def test_resume_equals_the_uninterrupted_run(config: MakeConfig, student: str) -> None:
    chosen = (f"consistency.student={student}", "steps=4")
    whole = train(config(*chosen, output="whole"))
    half = Trainer(config(*chosen, output="half"))
    save = half._save

    def saving() -> Path:
        raise RuntimeError(save().name)

    half._save = saving  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="step-00000002"):
        half.run()
    again = train(config(*chosen, output="half"))
    a, b = state(whole), state(again)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(LAYER in name for name in a)
    with pytest.raises(
        UserError, match=r"was trained with consistency\.guidance_range\.1 = 4.0, the config says 3"
    ):
        Trainer(config(*chosen, "consistency.guidance_range=[1, 3]", output="half")).resume()


def test_ways_to_compute_the_same_gradients(config: MakeConfig) -> None:
    found = []
    for overrides in ((), ("compile=false",), ("accumulate=3", "gradient_checkpointing=true")):
        trainer = Trainer(config(*overrides))
        loaded, total = trainer._load(2), {}
        for part in loaded.parts:
            gradients, _ = trainer.step.gradients(
                trainer.state.weights, part, loaded.text_total, loaded.image_total, 2
            )
            for name, value in tree_flatten(gradients):
                total[name] = total.get(name, 0) + np.array(value)
        found.append(total)
    assert np.linalg.norm(found[0][f"{LAYER}.weight"]) > 1e-4
    for other in found[1:]:
        for name, value in found[0].items():
            assert np.linalg.norm(other[name] - value) <= 2e-3 * np.linalg.norm(value) + 1e-6, name


def test_a_student_goes_on_from_a_student(config: MakeConfig) -> None:
    """Its layer is kept; a run without a range has no place for it."""
    first = train(config("steps=2"))
    trainer = Trainer(config(f"init={first}", output="second"))
    weights = dict(tree_flatten(trainer.model.parameters()))
    assert mx.array_equal(
        weights[f"{LAYER}.weight"], mx.load(str(first / "model.safetensors"))[f"{LAYER}.weight"]
    )
    text = (Path(config().consistency.teacher).parent / "distill.toml").read_text()  # type: ignore[union-attr, arg-type]
    toml = Path(config().consistency.teacher).parent / "fixed.toml"  # type: ignore[union-attr, arg-type]
    toml.write_text(text.replace("guidance_range = [1.0, 4.0]", ""))
    with pytest.raises(UserError, match="guidance_condition is for a student of several guidance scales"):
        Trainer(load_train_config(toml, [f"init={first}"]))
    assert not checkpoints(Path(config(output="second").output) / "checkpoints")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "consistency.guidance=5.0",
            r"consistency.guidance is 5: with guidance_range \[1, 4\] .* from 1 to 4",
        ),
        ("consistency.guidance_range=[4, 1]", r"guidance_range is \[4, 1\]: use two numbers"),
        ("consistency.guidance_range=[2, 2]", r"guidance_range is \[2, 2\]: use two numbers"),
        ("consistency.guidance_range=[-1, 4]", "use two numbers of 0 or more"),
        ("consistency.guidance_range=[1, inf]", "use two numbers of 0 or more"),
        ("consistency.guidance_range=[1, 2, 3]", "guidance_range: expected a list of 2"),
        ("consistency.guidance_range=3", "guidance_range: expected a list"),
    ],
)
def test_bad_ranges_are_refused(config: MakeConfig, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        config(change)
    assert "\n" not in str(error.value)


def test_a_range_needs_a_teacher_and_a_condition_a_range(folder: Path, tmp_path: Path) -> None:
    text = (folder / "distill.toml").read_text()
    toml = folder / "alone.toml"
    toml.write_text(text.replace('teacher = "teacher"', ""))
    with pytest.raises(UserError, match="guidance_range needs a teacher to guide"):
        load_train_config(toml)
    run = load_train_config(folder / "train.toml", ["model.guidance_condition=true", f"output={tmp_path}"])
    with pytest.raises(UserError, match="guidance_condition is for a student of several guidance scales"):
        Trainer(run)


# ---- painting ----


class Recording(Double):
    """A model whose passes are recorded: rows, and the scales that they were told."""

    def __init__(self, model: Transfusion) -> None:
        super().__init__(model)
        self.passes: list[tuple[int, list[float]]] = []

    def velocity(self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array) -> mx.array:
        self.passes.append((len(x), np.array(guidance).tolist()))
        return self.model.velocity(x, angle, cache, guidance)


@pytest.mark.parametrize(("asked", "told"), [(None, 2.0), (1.0, 1.0), (4.0, 4.0)])
def test_each_step_is_one_pass_that_is_told_the_scale(
    conditioned: Transfusion, asked: float | None, told: float
) -> None:
    model = Recording(conditioned)
    chosen = GenerationSettings(guidance=asked).for_model(STUDENT, "m")
    assert (chosen.sampler, chosen.steps, chosen.guidance) == ("consistency", 2, told)
    assert chosen.for_model(STUDENT, "m") == chosen.resolve() == chosen
    paint(model, [[1, 10, 4], [1, 11, 4]], [1, 2], chosen)  # type: ignore[arg-type]
    assert model.passes == [(2, [told, told])] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 4.5}, "model m has learned guidance 1 to 4, and guidance 4.5 is outside"),
        ({"guidance": 0.0}, "model m has learned guidance 1 to 4, and guidance 0 is outside"),
        ({"guidance": float("nan")}, "model m has learned guidance 1 to 4, and guidance nan is outside"),
        ({"guidance": 3.0, "negative_prompt": "cat"}, "without a second pass .* negative prompt"),
        ({"guidance_interval": (0.2, 1.0)}, "without a second pass .* no interval"),
        ({"sampler": "ddim"}, "model m is a consistency model"),
    ],
)
def test_what_it_cannot_paint_with(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GenerationSettings(**change).for_model(STUDENT, "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 9.0}, "objective.guidance is 9"),
        ({"guidance": None}, "objective.guidance is missing"),
        ({"guidance_range": [4.0, 1.0]}, r"objective.guidance_range is \[4, 1\]"),
        ({"guidance_range": [1.0]}, "guidance_range: expected a list of 2"),
    ],
)
def test_a_damaged_objective_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_objective({"objective": OBJECTIVE | change}, "m")
    assert read_objective(STUDENT, "m").guidance_inside


def test_distil_and_generate_end_to_end(
    cli: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("distill", folder / "distill.toml", "--set", "output=run", "--set", "steps=2")
    assert result.code == 0, result.err
    model = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    flags = ("generate", "red heart", "--model", model, "--seed", 3, "--overwrite")
    for scale in (None, 1.0, 3.5):
        result = cli(*flags, *(() if scale is None else ("--guidance", scale)))
        assert result.code == 0, result.err
        record = read_record("image.png")
        assert (record["sampler"], record["steps"], record["guidance"]) == ("consistency", 2, scale or 2.0)
        assert record["objective"]["guidance_range"] == [1.0, 4.0]
    first = Path("image.png").read_bytes()
    assert cli("generate", "--from", "image.png", "--model", model, "-o", "again.png").code == 0
    assert read_record("again.png")["guidance"] == 3.5
    assert Path("again.png").read_bytes() == first
    result = cli(*flags, "--guidance", 5)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "has learned guidance 1 to 4, and guidance 5 is outside" in line
    assert Path("image.png").read_bytes() == first
