"""Consistency training end to end: the objective on real batches, the loop, resume, what stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest
from mlx.utils import tree_flatten
from tiny_training import write_jsonl, write_run

from mlx_transfusion import consistency, trigflow
from mlx_transfusion.cli import _run
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.sequence import Image
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.checkpoint import checkpoints
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.consistency_step import LOSS_WEIGHT, ConsistencyStep, _arrays
from mlx_transfusion.training.prefix_data import PICTURE_MULTIPLE, count, prefix_batch, prefix_of
from mlx_transfusion.training.signals import BUCKETS, Signals, Watch
from mlx_transfusion.training.trainer import Trainer, train

DISTILL = """
[consistency]
teacher = "teacher"
adaptive_weight = true
guidance = 2.0
tangent_warmup = 2
valid_pictures = 3

[data]
caption_drop = 0.2

[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "texts.jsonl"

[[data.valid]]
rows = "pairs.jsonl"
images = "pictures"
"""
HEAD = """
output = "students"
tokenizer = "tokenizer.model"
steps = 6
batch_size = 9
sequence_length = 32
log_every = 1
save_every = 2
ema = 0.9
"""
TAIL = """
[optimizer]
learning_rate = 1e-3
warmup = 2
"""
MakeConfig = Callable[..., TrainConfig]
both_methods = pytest.mark.parametrize("method", ["scm", "ect"])


COLOURS = 48
"""Pictures of one colour each, 4x4 pixels. Their captions tell nothing, so a picture is decided by its noise, and
the way from noise to picture is smooth: a student of this size can learn it, and a posterior mean is far from it.
A patch has 12 numbers, fewer than the network is wide, or else no network could take the noise away."""
TEACHER = (
    "steps=300", "ema=0.98", "batch_size=16", "optimizer.learning_rate=5e-3", "data.caption_first=1.0",
    "model.image_height=4", "model.image_width=4", "model.patch_size=2", "model.image_std=0.58",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Data, a briefly trained teacher in `teacher`, and `distill.toml`."""
    folder = tmp_path_factory.mktemp("distill")
    toml = write_run(folder, tiny_tokenizer)
    rng = np.random.default_rng(0)
    for i in range(COLOURS):
        pixels = np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (4, 4, 3))
        PIL.Image.fromarray(pixels.copy()).save(folder / "pictures" / f"{i}.png")
    write_jsonl(
        folder / "pairs.jsonl",
        [{"image": f"{i}.png", "text": f"{('red', 'blue')[i % 2]} face"} for i in range(COLOURS)],
    )
    last = train(load_train_config(toml, [f"output={folder / 'first'}", *TEACHER]))
    last.rename(folder / "teacher")
    (folder / "distill.toml").write_text(HEAD + DISTILL + TAIL)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> MakeConfig:
    def make(*overrides: str, output: str = "students") -> TrainConfig:
        return load_train_config(folder / "distill.toml", [f"output={tmp_path / output}", *overrides])

    return make


def state(checkpoint: Path) -> dict[str, np.ndarray]:
    return {
        f"{file.name}:{name}": np.array(value)
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, value in mx.load(str(file)).items()
    }


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def step_of(trainer: Trainer) -> ConsistencyStep:
    assert isinstance(trainer.step, ConsistencyStep)
    return trainer.step


# ---- the batch ----


def test_documents_split_at_their_last_picture(config: MakeConfig) -> None:
    data = Trainer(config()).train_data
    documents = [d for step in range(8) for d in data.documents(step, 9)]
    kinds = {prefix_of(d) is not None: d for d in documents}
    assert set(kinds) == {True, False}
    for d in documents:
        prefix, segments = prefix_of(d), d.segments
        if prefix is None:
            assert not (segments and isinstance(segments[-3 if len(segments) > 2 else 0], Image))
            assert count(data, d) == (data.count(d)[0], 0)
        else:
            assert prefix[0] == 1
            assert prefix[-1] == 4
            assert count(data, d) == (len(prefix) - 1, 1)


def test_prefix_batch_holds_every_document_once(config: MakeConfig) -> None:
    data = Trainer(config()).train_data
    documents = data.documents(3, 9)
    batch = prefix_batch(data, documents)
    painted = [p for d in documents if (p := prefix_of(d)) is not None]
    assert len(batch.ids) % PICTURE_MULTIPLE == 0
    assert batch.weight.sum() == len(painted)
    for row, prefix in enumerate(painted):
        assert batch.ids[row, : batch.lengths[row]].tolist() == prefix
    assert batch.text_targets == sum(count(data, d)[0] for d in documents)
    k = int(batch.text_weight.sum())
    flat_ids = batch.ids.reshape(-1)
    wanted = [token for prefix in painted for token in prefix[1:]]
    assert batch.text_target[:k].tolist() == wanted == flat_ids[batch.text_index[:k] + 1].tolist()
    assert batch.rest is not None
    assert len(batch.rest.angle) % PICTURE_MULTIPLE == 0
    # pictures, noise and angles are those that plain training would draw for the same documents
    plain = data.pictures([d for d in documents if prefix_of(d) is not None])
    assert np.array_equal(batch.pictures.noise[: len(painted)], plain.noise)
    assert np.array_equal(batch.pictures.angle[: len(painted)], plain.angle)


# ---- the objective on the model ----


def test_passes_on_arrays_equal_generation(config: MakeConfig) -> None:
    """`read_prefix` and `paint` (padded, batched) give what `prefill` and `velocity` give one by one."""
    trainer = Trainer(config())
    model, batch = trainer.model, prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9))
    p, _ = _arrays(batch, model)
    _, prefix = model.read_prefix(p.ids)
    out = np.array(model.paint(p.x, p.angle, prefix, p.lengths))
    for row in range(int(batch.weight.sum())):
        length = batch.lengths[row : row + 1]
        _, cache = model.prefill(batch.ids[row : row + 1, : length[0]], length)
        alone = model.velocity(p.x[row : row + 1], p.angle[row : row + 1], cache)
        assert np.abs(np.array(alone)[0] - out[row]).max() < 1e-4


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_cos_velocity_is_that_of_generation(config: MakeConfig, prediction: str) -> None:
    import dataclasses

    trainer = Trainer(config())
    model = type(trainer.model)(dataclasses.replace(trainer.model.config, prediction=prediction))
    model.update(trainer.model.parameters())
    p, _ = _arrays(prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9)), model)
    angle = mx.minimum(p.angle, 1.5)
    _, prefix = model.read_prefix(p.ids)
    got = model.cos_velocity(p.x, angle, prefix, p.lengths)
    _, cache = model.prefill(np.array(p.ids)[:1, : int(p.lengths[0].item())], np.array(p.lengths[:1]))
    wanted = mx.cos(angle[:1, None, None]) * model.velocity(p.x[:1], angle[:1], cache)
    assert mx.abs(got[:1] - wanted).max().item() < 1e-4


def _tangent_of(trainer: Trainer, checkpointing: bool = False) -> tuple[np.ndarray, Any]:
    """J of a batch, and the function that gives F at any state of it."""
    model = trainer.model
    model.gradient_checkpointing = checkpointing
    p, _ = _arrays(prefix_batch(trainer.train_data, trainer.train_data.documents(1, 9)), model)
    _, prefix = model.read_prefix(p.ids)

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, prefix, p.lengths)

    value = consistency.value_and_derivative(network, p.x, p.angle, p.sample_velocity)
    return np.array(value.derivative), (network, p)


def test_derivative_equals_central_differences(config: MakeConfig) -> None:
    trainer = Trainer(config())
    derivative, (network, p) = _tangent_of(trainer)
    a, h = p.angle[:, None, None], 5e-3
    cosine = mx.maximum(mx.cos(a), 1e-3)
    v = p.sample_velocity / cosine

    def at(turn: float) -> mx.array:
        x = trigflow.rotate(p.x, v, a, a + turn)  # cos(h) x + sin(h) v
        return network(x, p.angle + turn)

    differences = np.array(mx.sin(a) * cosine * (at(h) - at(-h)) / (2 * h))
    real = slice(0, int(p.weight.sum().item()))
    error = np.linalg.norm(derivative[real] - differences[real]) / np.linalg.norm(derivative[real])
    assert np.linalg.norm(derivative[real]) > 1e-3
    assert error < 3e-3


def _gradients(trainer: Trainer, step: int = 2) -> tuple[dict[str, np.ndarray], np.ndarray]:
    loaded = trainer._load(step)
    total: dict[str, np.ndarray] = {}
    sums = np.zeros(2)
    for part in loaded.parts:
        gradients, part_sums = trainer.step.gradients(
            trainer.state.weights, part, loaded.text_total, loaded.image_total, step
        )
        for name, value in flat(gradients).items():
            total[name] = total.get(name, 0) + value
        sums += np.array(part_sums)
    return total, sums


@pytest.mark.parametrize(
    "overrides", [("gradient_checkpointing=true",), ("compile=false",), ("accumulate=3",)], ids=str
)
@both_methods
def test_ways_to_compute_the_same_gradients(
    config: MakeConfig, overrides: tuple[str, ...], method: str
) -> None:
    chosen = f"consistency.method={method}"
    plain, sums = _gradients(Trainer(config(chosen)))
    other, other_sums = _gradients(Trainer(config(chosen, *overrides)))
    assert np.allclose(sums, other_sums, rtol=1e-4)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        assert np.linalg.norm(other[name] - value) <= 2e-3 * np.linalg.norm(value) + 1e-7, name
    assert np.linalg.norm(plain["layers.0.self_attn.q_proj.weight"]) > 0


def test_gradient_moves_the_network_along_the_tangent(config: MakeConfig) -> None:
    """Against Algorithm 1 written out: a second forward pass, squared distance to sg(F) + g."""
    trainer = Trainer(config("accumulate=1", "consistency.adaptive_weight=false"))
    step, model = step_of(trainer), trainer.model
    batch = trainer._load(2).parts[0]
    p, texts = _arrays(batch, model)
    assert trainer.teacher is not None
    teacher = trainer.teacher.model

    def guided() -> mx.array:
        _, prefix = teacher.read_prefix(p.ids)
        cond = teacher.cos_velocity(p.x, p.angle, prefix, p.lengths)
        m = len(p.angle)
        _, alone = teacher.read_prefix(mx.array([[1, 4]] * m))
        null = teacher.cos_velocity(p.x, p.angle, alone, mx.full((m,), 2))
        return null + 2.0 * (cond - null)

    cos_v = guided()

    def network(x: mx.array, angle: mx.array) -> mx.array:
        return model.paint(x, angle, model.read_prefix(p.ids)[1], p.lengths)

    a = p.angle[:, None, None]
    cosine, sine = mx.cos(a), mx.sin(a)
    (f,), (j,) = mx.jvp(network, [p.x, p.angle], [sine * cos_v, mx.sin(p.angle) * mx.cos(p.angle)])
    g = -cosine * (cosine * f - cos_v) - (cosine * sine * p.x + j)
    g = g / (mx.sqrt(g.square().mean((1, 2), keepdims=True)) + 0.1)
    target, total = f + g, float(batch.weight.sum())

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        error = (network(p.x, p.angle) - target).square().mean((1, 2))
        return 5.0 * (error * p.weight).sum() / total

    wanted = flat(mx.grad(loss)(model.parameters()))
    # text alone is left out of the comparison by giving it no weight
    silent = tuple(mx.zeros_like(t) for t in texts)
    gradients, _, _ = step._plain_consistency_gradients(
        trainer.state.weights, tuple(p), silent, None, None, mx.array([0.0, 5.0 / total]), mx.array(1.0)
    )
    for name, value in flat(gradients).items():
        assert np.linalg.norm(value - wanted[name]) <= 1e-3 * np.linalg.norm(wanted[name]) + 1e-6, name


@pytest.mark.parametrize(("method", "recorded"), [("scm", "sct"), ("ect", "ect")])
def test_consistency_training_needs_no_teacher(
    folder: Path, tmp_path: Path, method: str, recorded: str
) -> None:
    text = (folder / "distill.toml").read_text().replace('teacher = "teacher"', "")
    toml = folder / "sct.toml"
    toml.write_text(text.replace("steps = 6", 'steps = 2\ninit = "teacher"'))
    last = train(load_train_config(toml, [f"output={tmp_path / 'sct'}", f"consistency.method={method}"]))
    objective = load(last).extra["objective"]
    assert objective["method"] == recorded
    assert objective["guidance"] == 1.0
    assert objective["teacher"] is None


def test_gradient_of_easy_tuning_is_that_of_two_points(config: MakeConfig) -> None:
    """Against ECT written out in float64: the squared distance of f at both points, f(x', b) held fixed.

    With the rescaling switched off, mean((f(x, a) - f(x', b))^2) / (gap sin(a)^2) has the gradient -2 d dF.
    """
    trainer = Trainer(
        config("consistency.method=ect", "consistency.adaptive_weight=false", "consistency.tangent=none")
    )
    step, model = step_of(trainer), trainer.model
    batch = trainer._load(2).parts[0]
    p, texts = _arrays(batch, model)
    p = p._replace(angle=mx.clip(p.angle, 0.2, 1.4))
    silent, total = tuple(mx.zeros_like(t) for t in texts), float(batch.weight.sum())
    cos_v = np.array(step._cos_velocity(p))
    at_noise = 0.125
    a = np.array(p.angle, np.float64)
    gap = np.minimum(1, at_noise * (1 + 8 / (1 + np.exp(np.tan(a) / 2))))
    b = np.arctan((1 - gap) * np.tan(a))
    turn = (a - b)[:, None, None]
    moved = np.cos(turn) * np.array(p.x) - np.sin(turn) * cos_v / np.cos(a)[:, None, None]
    x, earlier = mx.array(moved.astype(np.float32)), mx.array(b.astype(np.float32))

    def ends(x: mx.array, angle: mx.array) -> mx.array:
        out = model.paint(x, angle, model.read_prefix(p.ids)[1], p.lengths)
        return trigflow.x0_from_velocity(x, out, angle[:, None, None])

    target = ends(x, earlier)
    scale = mx.array((1 / (gap * np.sin(a) ** 2)).astype(np.float32)) * p.weight * 5.0 / total

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        return ((ends(p.x, p.angle) - target).square().mean((1, 2)) * scale).sum()

    wanted = flat(mx.grad(loss)(model.parameters()))
    model.update(trainer.state.weights)
    gradients, _, _ = step._plain_consistency_gradients(
        trainer.state.weights, tuple(p), silent, None, None, mx.array([0.0, 5.0 / total]), mx.array(at_noise)
    )
    for name, value in flat(gradients).items():
        assert np.linalg.norm(value - wanted[name]) <= 2e-3 * np.linalg.norm(wanted[name]) + 1e-5, name


def test_guidance_changes_the_target_and_one_saves_a_pass(config: MakeConfig) -> None:
    kinds = {}
    for scale in (1.0, 2.0):
        trainer = Trainer(config(f"consistency.guidance={scale}"))
        p, _ = _arrays(trainer._load(0).parts[0], trainer.model)
        kinds[scale] = np.array(step_of(trainer)._cos_velocity(p))
    assert np.abs(kinds[1.0] - kinds[2.0]).max() > 1e-3


# ---- the loop ----


@pytest.mark.parametrize(("method", "recorded"), [("scm", "scd"), ("ect", "ect")])
def test_a_run_saves_a_consistency_model(config: MakeConfig, method: str, recorded: str) -> None:
    run = config(
        f"consistency.method={method}",
        "valid_every=3",
        "sample.every=6",
        'sample.prompts=["red star", "blue moon"]',
    )
    last = train(run)
    loaded = load(last)
    teacher = load(run.consistency.teacher)  # type: ignore[union-attr]
    assert loaded.extra["objective"] == {
        "name": "consistency", "method": recorded, "teacher": teacher.fingerprint, "guidance": 2.0, "angles": [1.1],
    }  # fmt: skip
    assert not any(name.startswith(LOSS_WEIGHT) for name, _ in tree_flatten(loaded.model.parameters()))
    rows = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    assert {"valid_text_loss", "valid_teacher_gap_1", "valid_teacher_gap_2"} < rows[-1].keys()
    signals = {key.split("/")[0] for row in rows for key in row if "/" in key}
    assert signals == {"tangent", "drift", "derivative", "loss", "log_weight"}
    assert (Path(run.output) / "samples" / "step-00000006.png").is_file()


@both_methods
def test_distillation_brings_the_student_to_its_teacher(config: MakeConfig, method: str) -> None:
    """One step paints ever more like the teacher's many; a wrong objective leaves the gap or widens it.

    200 steps bring it to 0.2-0.55 of its start (three seeds). Without the derivative, with the tangent's sign
    flipped, or with the posterior mean as target it stays where it was (1.0) or grows: all measured.
    """
    run = config(
        f"consistency.method={method}", "steps=200", "save_every=1000", "batch_size=16",
        "optimizer.learning_rate=3e-3", "optimizer.weight_decay=0", "ema=0.9",
        "consistency.tangent_warmup=20", "consistency.valid_pictures=16",
        "consistency.guidance=1.0", "consistency.adaptive_weight=false", "data.caption_drop=0",
        "data.caption_first=1.0", "diffusion.high_noise_share=[0.3, 0.3]",
    )  # fmt: skip
    trainer = Trainer(run)
    assert trainer.valid_data is not None
    before = trainer.step.validate(trainer.valid_data, 1, 9)
    trainer.run()
    trainer.model.update(trainer.state.ema)
    after = trainer.step.validate(trainer.valid_data, 1, 9)
    assert before["valid_teacher_gap_1"] > 0.4
    assert after["valid_teacher_gap_1"] < 0.7 * before["valid_teacher_gap_1"]
    assert after["valid_text_loss"] < before["valid_text_loss"] + 0.1


@both_methods
def test_resume_equals_the_uninterrupted_run(config: MakeConfig, method: str) -> None:
    chosen = f"consistency.method={method}"
    whole = train(config(chosen, output="whole"))
    half = Trainer(config(chosen, "save_every=3", output="half"))
    stop_after(half, 3)
    again = train(config(chosen, "save_every=3", output="half"))
    a, b = state(whole), state(again)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(LOSS_WEIGHT in name for name in a)


def test_a_run_of_an_older_version_resumes(config: MakeConfig) -> None:
    """Its record lacks the keys that came later: they count as their defaults, not as another run."""
    stop_after(Trainer(config("save_every=3")), 3)
    file = checkpoints(Path(config().output) / "checkpoints")[-1] / "state.json"
    record = json.loads(file.read_text())
    for key in ("method", "gap_stages", "gap_factor"):
        del record["config"]["consistency"][key]
    del record["config"]["optimizer"]["muon_learning_rate"]
    file.write_text(json.dumps(record))
    assert Trainer(config("save_every=3")).resume()
    with pytest.raises(UserError, match=r"was trained with consistency\.method = scm, the config says ect"):
        Trainer(config("save_every=3", "consistency.method=ect")).resume()


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


def test_a_blow_up_stops_and_keeps_the_last_good_state(config: MakeConfig) -> None:
    run = config(
        "optimizer.learning_rate=1e9", "optimizer.clip=0", "optimizer.warmup=0", "steps=200", "save_every=1"
    )
    with pytest.raises(UserError, match=r"blew up: .* left its usual range first|not finite any more"):
        train(run)
    kept = checkpoints(Path(run.output) / "checkpoints")
    for name, value in state(kept[-1]).items() if kept else ():
        assert np.isfinite(value).all(), name


# ---- signals ----


def test_signals_average_by_angle() -> None:
    signals = Signals()
    angle = np.array([0.05, 0.1, 1.5, 1.0], np.float32)
    seen = mx.array(np.arange(20, dtype=np.float32).reshape(5, 4))
    signals.add(np.array([1, 1, 1, 0]), angle, seen)
    assert signals.tangent() == 1.0
    out = signals.collect()
    width = np.pi / 2 / BUCKETS
    assert out[f"tangent/0.00-{width:.2f}"] == 0.5
    assert out[f"loss/{7 * width:.2f}-1.57"] == 14.0
    assert out["tangent_worst"] == 2.0
    assert signals.collect() == {}


def test_watch_names_the_first_signal() -> None:
    watch = Watch()
    for step in range(50):
        assert watch.observe(step, {"tangent": 1.0 + step % 3, "gradient norm": 2.0}) is None
    assert watch.calm
    assert watch.observe(50, {"tangent": 1000.0, "gradient norm": 2.0}) is None
    assert not watch.calm
    assert watch.observe(51, {"tangent": 1.0, "gradient norm": 2.0}) is None
    assert watch.calm
    for step in range(52, 52 + Watch.PATIENCE):
        assert watch.observe(step, {"tangent": 1000.0, "gradient norm": 500.0 if step > 55 else 2.0}) is None
    trouble = watch.observe(52 + Watch.PATIENCE, {"tangent": 1000.0, "gradient norm": 500.0})
    assert trouble == "tangent left its usual range first, at step 52"
    assert "gradient norm" in (Watch().observe(0, {"gradient norm": float("nan"), "tangent": 1.0}) or "")


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("consistency.tangent=normalise",), 'consistency.tangent is "normalise", expected one of normalize'),
        (("consistency.method=meanflow",), 'consistency.method is "meanflow", expected one of scm, ect'),
        (("consistency.gap_factor=1.5",), "consistency.gap_factor is 1.5, expected 2"),
        (("consistency.gap_stages=20",), "to the power of gap_stages 20"),
        (("consistency.guidance=-1",), "consistency.guidance is -1"),
        (("consistency.teecher=emoji",), 'unknown key "teecher"; did you mean "teacher"'),
        (("consistency.angles=[2.0]",), r"consistency.angles\[0\] is 2.0"),
        (("model.hidden_size=16",), "missing"),
    ],
)
def test_bad_tables_are_refused(config: MakeConfig, change: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(config(*change))


def test_a_teacher_is_a_diffusion_model(config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    """Its objective decides; a diffusion model may say that it is one."""
    for name in ("diffusion", "consistency"):
        copy = shutil.copytree(folder / "teacher", tmp_path / name)
        table = json.loads((copy / "config.json").read_text()) | {"objective": {"name": name}}
        (copy / "config.json").write_text(json.dumps(table))
    assert Trainer(config(f"consistency.teacher={tmp_path / 'diffusion'}")).teacher is not None
    with pytest.raises(UserError, match="is a consistency model itself"):
        Trainer(config(f"consistency.teacher={tmp_path / 'consistency'}"))


def test_verbs_and_tables_belong_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", str(folder / "distill.toml")]) == 2
    assert "use the verb distill" in capsys.readouterr().err
    assert _run(["distill", str(folder / "train.toml")]) == 2
    assert "no [consistency] table" in capsys.readouterr().err


def test_a_consistency_model_is_no_teacher(config: MakeConfig) -> None:
    student = train(config("steps=1"))
    with pytest.raises(UserError, match="is a consistency model itself"):
        Trainer(config(f"consistency.teacher={student}", output="second"))


# ---- a painter: own weights for pictures, text frozen ----


def test_a_painter_leaves_reading_and_writing_as_they_were(config: MakeConfig) -> None:
    run = config("consistency.student=painter", "steps=4")
    teacher, student = load(run.consistency.teacher), load(train(run))  # type: ignore[union-attr]
    assert student.config.painter
    before, after = flat(teacher.model.parameters()), flat(student.model.parameters())
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    own = {
        name.removeprefix("painter."): value for name, value in after.items() if name.startswith("painter.")
    }
    assert own.keys() <= before.keys()
    assert any(not np.array_equal(v, before[n]) for n, v in own.items())
    assert not any("embed_tokens" in name or "lm_head" in name for name in own)
    ids, lengths = np.array([[1, 7, 8, 4]]), np.array([4])
    logits, cache = student.model.prefill(ids, lengths)
    wanted, teachers = teacher.model.prefill(ids, lengths)
    assert np.array_equal(np.array(logits), np.array(wanted))
    shape = (1, student.config.patches_per_image, student.config.patch_dim)
    x, angle = mx.random.normal(shape, key=mx.random.key(0)), mx.array([0.9])
    painted, same = student.model.velocity(x, angle, cache), teacher.model.velocity(x, angle, teachers)
    assert mx.abs(painted - same).max().item() > 0
    student.model.extend_image(x, cache)
    teacher.model.extend_image(x, teachers)
    for ours, theirs in zip(cache.layers, teachers.layers, strict=True):
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(np.array(ours[0]), np.array(theirs[0]))


def test_a_painter_starts_as_its_teacher(config: MakeConfig) -> None:
    trainer = Trainer(config("consistency.student=painter"))
    assert trainer.teacher is not None
    p, _ = _arrays(trainer._load(0).parts[0], trainer.model)
    _, prefix = trainer.model.read_prefix(p.ids)
    a, b = (m.paint(p.x, p.angle, prefix, p.lengths) for m in (trainer.model, trainer.teacher.model))
    assert np.array_equal(np.array(a), np.array(b))
    assert set(trainer.state.weights) == {"painter", LOSS_WEIGHT}
    assert set(trainer.state.ema) == {"painter"}


def test_a_painter_resumes_exactly(config: MakeConfig) -> None:
    whole = train(config("consistency.student=painter", output="whole"))
    half = Trainer(config("consistency.student=painter", "save_every=3", output="half"))
    stop_after(half, 3)
    again = train(config("consistency.student=painter", "save_every=3", output="half"))
    a, b = state(whole), state(again)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_painter_needs_a_model_to_stand_beside(folder: Path) -> None:
    toml = folder / "alone.toml"
    toml.write_text(
        (folder / "distill.toml").read_text().replace('teacher = "teacher"', 'student = "painter"')
    )
    with pytest.raises(UserError, match=r"needs a teacher or init|there is no model to start from"):
        load_train_config(toml)


def test_a_painter_that_reads_otherwise_than_its_teacher_shares_no_prefix(
    config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    """From another model than the teacher: the teacher's velocity must come from the teacher's own prefix."""
    other = load(folder / "teacher")
    embedding = other.model.embed_tokens
    embedding.weight = embedding.weight + 0.5
    save_model(tmp_path / "other", other.model, other.tokenizer)
    alike = Trainer(config("consistency.student=painter", output="alike"))
    apart = Trainer(config("consistency.student=painter", f"init={tmp_path / 'other'}", output="apart"))
    assert step_of(alike)._read_alike
    assert not step_of(apart)._read_alike
    assert apart.teacher is not None
    p, _ = _arrays(apart._load(0).parts[0], apart.model)
    _, prefix = apart.teacher.model.read_prefix(p.ids)
    wanted, found = step_of(alike)._cos_velocity(p, prefix), step_of(apart)._cos_velocity(p)
    assert mx.abs(wanted - found).max().item() < 1e-5
    _, wrong = apart.model.read_prefix(p.ids)
    assert mx.abs(step_of(alike)._cos_velocity(p, wrong) - found).max().item() > 1e-3


def test_a_full_student_cannot_start_from_a_painter(config: MakeConfig) -> None:
    painter = train(config("consistency.student=painter", "steps=1", output="painter"))
    with pytest.raises(UserError, match="has a painter"):
        Trainer(config(f"init={painter}", output="full"))
