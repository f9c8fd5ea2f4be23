"""Fine-tuning and distilling converted models, every family on a tiny model of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_tools import FAMILIES, album, model_folder, run_config
from mlx.utils import tree_flatten

from mlx_transfusion import generate_images
from mlx_transfusion.consistency import value_and_derivative
from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune.families import PARTS
from mlx_transfusion.model_io import load
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.config import AdapterTraining
from mlx_transfusion.training.consistency_config import ConsistencyConfig
from mlx_transfusion.training.trainer import Trainer, train

LORA = AdapterTraining(rank=2)
TWO = GenerationSettings(steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("families")
    return {kind: model_folder(kind, top / kind) for kind in FAMILIES} | {"album": album(top / "album")}


def arrays(path: Path) -> dict[str, Any]:
    return {file.name: mx.load(str(file)) for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_learns_is_resumed_exactly_and_paints(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = run_config(folders[kind], folders["album"], tmp_path / "out", adapter=LORA)
    last = train(config)
    wanted = {name: {key: np.array(x) for key, x in found.items()} for name, found in arrays(last).items()}
    adapted = paint_one(load(last))
    shutil.rmtree(last)  # the one of step 2 is left
    for name, found in arrays(train(config)).items():
        for key, value in found.items():
            np.testing.assert_array_equal(np.array(value), wanted[name][key], err_msg=f"{name}: {key}")
    assert not mx.array_equal(adapted, paint_one(load(folders[kind])))


def paint_one(loaded: Any, settings: GenerationSettings = TWO) -> mx.array:
    return mx.array(generate_images(loaded, "red square", 1, settings)[0].pixels)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_falls(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """All weights but the frozen modules are trained on the same noise again and again; those stay as they are."""
    config = run_config(folders[kind], folders["album"], tmp_path / "out", optimizer=quick())
    trainer = Trainer(config)
    batch = trainer.step.load(trainer.train_data, trainer.train_data.documents(0, 4))
    weights, ema = trainer.state.weights, trainer.state.ema
    seen = []
    for step in range(6):
        gradients, sums = trainer.step.gradients(weights, batch, 2, 3, step)
        weights, ema, _ = trainer.step.update(gradients, weights, ema, 0.5)
        trainer.model.update(weights)
        mx.eval(weights)
        seen.append((sums * mx.array([1 / 2, 5 / 3])).sum().item())
    assert seen[-1] < 0.9 * seen[0]
    before = load(folders[kind]).model.parameters()
    for name in PARTS[kind].frozen:
        for (key, ours), (_, theirs) in zip(
            tree_flatten(trainer.model.parameters().get(name, {})),
            tree_flatten(before.get(name, {})),
            strict=True,
        ):
            assert mx.array_equal(ours, theirs), f"{name}.{key}"


def quick() -> Any:
    from mlx_transfusion.training.config import OptimizerConfig

    return OptimizerConfig(learning_rate=1e-3, warmup=0, weight_decay=0.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_image_only_adapter_leaves_text_alone(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spec = AdapterTraining(rank=2, modality="image")
    last = train(run_config(folders[kind], folders["album"], tmp_path / "out", adapter=spec, steps=2))
    base, ours = load(folders[kind]), load(last)
    ids = np.array([[3, 4, 5, 3]])
    for one, other in zip(
        tree_flatten([base.model.prefill(ids, np.array([4]))[1].layers]),
        tree_flatten([ours.model.prefill(ids, np.array([4]))[1].layers]),
        strict=True,
    ):
        assert mx.array_equal(one[1], other[1])
    assert not mx.array_equal(paint_one(ours), paint_one(base))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["scm", "ect", "scm_hops"])
def test_a_student_is_distilled_and_paints_in_two_steps(
    kind: str, method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    c = ConsistencyConfig(method=method, teacher=str(folders[kind]), guidance=2.0, valid_pictures=2)
    config = run_config(
        folders[kind], folders["album"], tmp_path / "out", adapter=LORA, consistency=c, init=None, steps=2
    )
    last = train(config)
    loaded = load(last)
    assert loaded.extra["objective"]["name"] == "consistency"
    image = generate_images(loaded, "red square", 1, TWO)[0]
    assert (image.settings["sampler"], image.settings["guidance"]) == ("consistency", 1.0)
    with pytest.raises(UserError, match="consistency model"):
        generate_images(loaded, "red square", 1, GenerationSettings(sampler="ddim"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tangent_is_that_of_differences(kind: str, folders: dict[str, Path]) -> None:
    """dF/da along the teacher's guided trajectory, as a student with an adapter sees it, by central differences."""
    c = ConsistencyConfig(teacher=str(folders[kind]), guidance=2.0)
    config = run_config(
        folders[kind], folders["album"], folders[kind], adapter=LORA, consistency=c, init=None
    )
    trainer = Trainer(config)
    step: Any = trainer.step
    batch = step.load(trainer.train_data, trainer.train_data.documents(0, 4))
    at, _ = step._states(batch)
    angle = mx.full(at.angle.shape, 0.8)
    cache = step._prompts(trainer.model, batch)

    def network(x: mx.array, a: mx.array) -> mx.array:
        return trainer.model.velocity(x, a, cache)

    value = value_and_derivative(network, at.x, angle, at.cos_velocity)
    h, s, k = 3e-4, np.sin(0.8), np.cos(0.8)
    ahead, behind = (network(at.x + d * s * at.cos_velocity, angle + d * s * k) for d in (h, -h))
    difference = (ahead - behind) / (2 * h)
    error = mx.sqrt((value.derivative - difference).square().mean()) / mx.sqrt(difference.square().mean())
    assert float(error) < 0.02


def test_the_verbs(folders: dict[str, Path], tmp_path: Path, cli: Any) -> None:
    """finetune --check, finetune with a quantised base, generate with the adapter, fuse."""
    model, out = folders["janusflow"], tmp_path / "adapter"
    flags = ["--model", model, "--data", folders["album"], "--output", out, "--iters", 2, "--rank", 2]
    checked = cli("finetune", *flags, "--check", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["rows"] == 3
    assert not out.exists()
    tuned = cli("finetune", *flags, "--quantize", 8, "--target", "language_model.*_proj")
    assert tuned.code == 0, tuned.err
    for name in ("--adapter", "--model"):
        extra = ["--model", model] if name == "--adapter" else []
        painted = cli("generate", "a red square", *extra, name, out, "--seed", 1, "-o", tmp_path / f"{name}.png",
                      "--steps", 2)  # fmt: skip
        assert painted.code == 0, painted.err
    assert (tmp_path / "--adapter.png").exists()
    fused = cli("fuse", "--model", model, "--adapter", out, "--output", tmp_path / "whole")
    assert fused.code == 0, fused.err
    one, other = paint_one(load(tmp_path / "whole")), paint_one(load(out))
    assert int(mx.abs(one.astype(mx.int32) - other.astype(mx.int32)).max()) <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"adapter": AdapterTraining(modality="image", targets=("language_model.*_proj",))},
            "which text passes too",
        ),
        ({"model": {}}, "is not trained with [model]"),
        ({"consistency": ConsistencyConfig(teacher="X", student="painter")}, "give an [adapter] table"),
        ({"consistency": ConsistencyConfig(teacher="X", text="teacher")}, 'with consistency.text "teacher"'),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is not there"),
        ({"dtype": "bfloat16"}, "without [adapter]"),
    ],
)
def test_what_cannot_be_trained(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "consistency" in changes:
        teacher = str(folders["janusflow"])
        changes = {"consistency": dataclasses.replace(changes["consistency"], teacher=teacher)}
    config = run_config(folders["janusflow"], folders["album"], tmp_path / "out", **changes)
    with pytest.raises(UserError, match=re.escape(said)):
        Trainer(config)
    assert not (tmp_path / "out").exists()
