"""`examples/emoji/bundle.py`: what it stores is small, complete and paints."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion import model_path
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.lora_extract import extract
from mlx_transfusion.model_io import flat_parameters, load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.text_to_image import generate_images
from mlx_transfusion.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "emoji" / "bundle.py"
OBJECTIVE = {"name": "consistency", "method": "scd", "teacher": "0" * 16, "guidance": 3.0, "angles": [1.1]}
FLOATS = ("patch_encoder", "patch_decoder", "angle_embedding", "norm")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a package of its own to write into."""
    specification = importlib.util.spec_from_file_location("bundle", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "bundled").mkdir()
    monkeypatch.setattr(module, "BUNDLED", tmp_path / "bundled")
    return module


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Transfusion],
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
) -> Path:
    """A teacher and a student of a width that divides into groups of 64."""
    folder, config = tmp_path_factory.mktemp("models"), dataclasses.replace(tiny_config, hidden_size=64)
    save_model(folder / "teacher", make_model(config), tiny_tokenizer)
    save_model(folder / "student", make_model(config, 1), tiny_tokenizer, {"objective": OBJECTIVE})
    return folder


def stored(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def test_half_precision(
    bundle: ModuleType, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle.main([str(models / "teacher")]) == 0
    folder = tmp_path / "bundled" / "emoji"
    assert f"{folder}: {bundle.size(folder) / 1e6:.2f} MB\n" in capsys.readouterr().out
    assert {v.dtype for v in stored(folder).values()} == {mx.float16}
    assert load(folder).extra == {}
    for name, value in flat_parameters(load(models / "teacher").model).items():
        np.testing.assert_allclose(flat_parameters(load(folder).model)[name], value, atol=1e-3)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.005), (6, 0.02)])
def test_few_bits(bundle: ModuleType, models: Path, tmp_path: Path, bits: int, worst: float) -> None:
    assert bundle.main([str(models / "student"), "--bits", str(bits)]) == 0
    folder = tmp_path / "bundled" / "emoji-2step"
    arrays = stored(folder)
    packed = {name for name, value in arrays.items() if value.dtype == mx.uint32}
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.down_proj.weight"} <= packed
    assert not [name for name in packed if name.startswith(FLOATS)]
    assert {v.dtype for k, v in arrays.items() if k not in packed} == {mx.float16}
    student = flat_parameters(load(models / "student").model)
    quantised = sum(student[name].size for name in packed)
    rest = sum(value.size for name, value in student.items() if name not in packed)
    # A scale and a bias of 16 bits for every 64 numbers.
    assert sum(v.nbytes for v in arrays.values()) == quantised * bits / 8 + quantised / 64 * 4 + 2 * rest
    loaded = load(folder)
    if mx.default_device().type == mx.DeviceType.cpu:
        assert loaded.extra == {"objective": OBJECTIVE}
        for name, value in flat_parameters(loaded.model).items():
            error = float(np.sqrt(np.square(np.array(value - student[name])).mean()))
            assert error <= worst, name
    whole, small = (generate_images(load(f), "red heart", seeds=4)[0] for f in (models / "student", folder))
    assert small.settings["sampler"] == "consistency"
    assert whole.pixels.shape == small.pixels.shape
    # What was expanded can be stored again.
    again = bundle.bundle(str(folder), output=tmp_path / "again")
    assert load(again).extra["objective"] == OBJECTIVE


def test_an_adapter_becomes_a_whole_model(bundle: ModuleType, models: Path, tmp_path: Path) -> None:
    adapter = extract(models / "teacher", models / "student", 8, tmp_path / "adapter").folder
    folder = bundle.bundle(str(adapter), bits=8)
    assert folder.name == "emoji-2step"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model",
    ]  # fmt: skip
    assert load(folder).extra["objective"] == OBJECTIVE


def test_a_bundled_adapter_finds_the_bundled_teacher(
    bundle: ModuleType, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_path.resources, "files", lambda package: tmp_path)
    bundle.main([str(models / "teacher")])
    extract("emoji", models / "student", 8, tmp_path / "bundled" / "emoji-2step")
    assert load("emoji-2step").extra == {"objective": OBJECTIVE}
    assert load("emoji-2step").name == "emoji-2step"


def test_bad_input(
    bundle: ModuleType, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle.main([str(tmp_path / "nowhere")]) == 2
    assert bundle.main([str(models / "student"), "--bits", "7"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["error", "error"]
    assert "cannot quantise to 7 bits" in errors[1]
    assert not list((tmp_path / "bundled").iterdir())
