"""Model folders: what is written is read back, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_transfusion import model_io
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import flat_parameters, load, load_config, save_model
from mlx_transfusion.models.transfusion import Transfusion, with_painter
from mlx_transfusion.quantization import parameter_count, quantize
from mlx_transfusion.tokenizer import Tokenizer

MakeModel = Callable[..., Transfusion]


def flat(model: Transfusion) -> dict[str, np.ndarray]:
    return {k: np.array(v.astype(mx.float32)) for k, v in flat_parameters(model).items()}


def test_save_and_load(tiny_model: Transfusion, tiny_model_dir: Path, tiny_tokenizer: Tokenizer) -> None:
    loaded = load(tiny_model_dir)
    assert loaded.config == tiny_model.config
    assert loaded.name == "tiny"
    for name, value in flat(tiny_model).items():
        np.testing.assert_array_equal(flat(loaded.model)[name], value)
    assert loaded.tokenizer.encode("red heart") == tiny_tokenizer.encode("red heart")
    assert not [p for p in tiny_model_dir.iterdir() if "partial" in p.name]


def test_layout_of_the_folder(tiny_model: Transfusion, tiny_model_dir: Path) -> None:
    text = (tiny_model_dir / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=4, sort_keys=True) + "\n"
    index = json.loads((tiny_model_dir / "model.safetensors.index.json").read_text())
    weights = flat_parameters(tiny_model)
    assert index["metadata"] == {
        "total_size": sum(v.nbytes for v in weights.values()),
        "total_parameters": sum(v.size for v in weights.values()),
    }
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    with safe_open(str(tiny_model_dir / "model.safetensors"), "numpy") as file:  # as other programs read it
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(weights)


def test_several_files(tmp_path: Path, tiny_model: Transfusion, tiny_tokenizer: Tokenizer,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(model_io, "MAX_FILE_BYTES", 20_000)
    save_model(tmp_path, tiny_model, tiny_tokenizer)
    files = sorted(p.name for p in tmp_path.glob("model*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = load(tmp_path)
    for name, value in flat(tiny_model).items():
        np.testing.assert_array_equal(flat(loaded.model)[name], value)


def test_half_precision_storage_loads_as_float32_on_the_cpu(
    tmp_path: Path, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> None:
    save_model(tmp_path, tiny_model, tiny_tokenizer, dtype=mx.float16)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(stored, dict)
    assert {v.dtype for v in stored.values()} == {mx.float16}
    assert {v.dtype for _, v in flat_parameters(load(tmp_path, dtype=mx.float16).model).items()} == {
        mx.float16
    }
    if mx.default_device().type == mx.DeviceType.cpu:
        loaded = load(tmp_path)
        assert {v.dtype for _, v in flat_parameters(loaded.model).items()} == {mx.float32}
        for name, value in flat(tiny_model).items():
            np.testing.assert_allclose(flat(loaded.model)[name], value, atol=1e-3)


def test_saving_over_an_old_model(
    make_model: MakeModel, tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    for seed in (1, 2):
        save_model(tmp_path, make_model(tiny_config, seed), tiny_tokenizer)
        # A lazily loaded model saved over itself must not read the file that it replaces.
        save_model(tmp_path, load(tmp_path).model, tmp_path / "tokenizer.model")
        expected = flat(make_model(tiny_config, seed))
        got = flat(load(tmp_path).model)
        assert all((got[k] == expected[k]).all() for k in expected)


def test_fingerprint_tells_weights_apart(
    make_model: MakeModel,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tiny_model_dir: Path,
) -> None:
    same = save_model(tmp_path / "same", make_model(tiny_config), tiny_tokenizer)
    other = save_model(tmp_path / "other", make_model(tiny_config, 5), tiny_tokenizer)
    first = load(tiny_model_dir).fingerprint
    assert len(first) == 16
    assert load(same).fingerprint == first != load(other).fingerprint


def test_extra_tables_of_the_config(
    tmp_path: Path, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> None:
    save_model(tmp_path, tiny_model, tiny_tokenizer, extra={"training": {"steps": 7}})
    assert load(tmp_path).extra == {"training": {"steps": 7}}
    assert load_config(tmp_path) == tiny_model.config
    with pytest.raises(UserError, match="weather"):
        save_model(tmp_path, tiny_model, tiny_tokenizer, extra={"weather": "fine"})


def test_quantised_model(
    make_model: MakeModel, tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    plain = make_model(tiny_config)
    model = quantize(make_model(tiny_config), bits=8, group_size=32)
    assert parameter_count(model) == parameter_count(plain) == sum(v.size for v in flat(plain).values())
    save_model(tmp_path, model, tiny_tokenizer)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert "lm_head.scales" in stored
    assert "patch_decoder.proj.scales" not in stored
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 8}
    got = flat(load(tmp_path).model)
    if mx.default_device().type == mx.DeviceType.cpu:
        for name, value in flat(plain).items():
            np.testing.assert_allclose(got[name], value, atol=0.01)
    # What was expanded is saved as a plain model.
    save_model(tmp_path / "again", load(tmp_path).model, tiny_tokenizer)
    assert load(tmp_path / "again").extra == {} or mx.default_device().type != mx.DeviceType.cpu


def test_quantising_leaves_matrices_alone_that_do_not_divide(
    make_model: MakeModel, tiny_config: ModelConfig
) -> None:
    model = quantize(
        make_model(tiny_config), bits=4, group_size=64
    )  # width 32: only down_proj has rows of 64
    scaled = {k.rsplit(".", 1)[0] for k, _ in flat_parameters(model).items() if k.endswith("scales")}
    assert scaled == {f"layers.{i}.mlp.down_proj" for i in range(2)}
    with pytest.raises(UserError, match="7 bits"):
        quantize(model, bits=7)


def test_a_painter_is_quantised_like_the_model_beside_it(
    make_model: MakeModel, tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    plain = with_painter(make_model(tiny_config))
    model = quantize(with_painter(make_model(tiny_config)), bits=8, group_size=32)
    own = {k for k in flat_parameters(model) if k.startswith("layers.") and k.endswith("scales")}
    beside = {k for k in flat_parameters(model) if k.startswith("painter.") and k.endswith("scales")}
    assert beside == {f"painter.{k}" for k in own}
    assert own
    assert parameter_count(model) == parameter_count(plain)
    save_model(tmp_path, model, tiny_tokenizer)
    if mx.default_device().type == mx.DeviceType.cpu:
        for name, value in flat(load(tmp_path).model).items():
            np.testing.assert_allclose(value, flat(plain)[name], atol=0.01)


@pytest.fixture
def copy(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def rewrite_weights(folder: Path, change: dict[str, mx.array | None]) -> None:
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    mx.eval(weights)
    for name, value in change.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    mx.save_safetensors(str(file), weights)


def test_every_fault_of_the_weights_is_listed(copy: Path) -> None:
    rewrite_weights(
        copy, {"norm.weight": None, "surplus": mx.zeros((1,)), "lm_head.weight": mx.zeros((3, 32))}
    )
    with pytest.raises(UserError) as caught:
        load(copy)
    message = str(caught.value)
    assert "missing norm.weight" in message
    assert "unexpected surplus" in message
    assert "lm_head.weight has shape [3, 32], expected [288, 32]" in message
    assert "\n" not in message


def edit_config(folder: Path, **change: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, 'unknown key "hiden_size"; did you mean "hidden_size"?'),
        ({"hidden_size": "x"}, "hidden_size: expected int"),
        ({"model_type": "unicorn"}, 'model_type is "unicorn"'),
        ({"quantization": 4}, "must hold group_size and bits"),
        ({"vocab_size": 100}, "lm_head.weight has shape"),
    ],
)
def test_bad_config(copy: Path, change: dict[str, object], message: str) -> None:
    edit_config(copy, **change)
    with pytest.raises(UserError) as caught:
        load(copy)
    assert message in str(caught.value)


def test_broken_files(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="is not a model folder"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, None])
def test_corrupt_weights(copy: Path, content: bytes | None) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="corrupt weights"):
        load(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weight files are missing: model\.safetensors"):
        load(copy)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load(copy)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="not a readable weight index"):
        load(copy)


def test_foreign_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load(copy)


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nowhere", "./nowhere/at", str(tmp_path / "nowhere"), "../a"):
        with pytest.raises(UserError, match="does not exist"):
            load(name)
    with pytest.raises(UserError, match="Hugging Face hub cannot give it"):
        load("nobody/nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a model folder"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match="is not a model folder"):
        load(tmp_path)


def test_folder_that_cannot_be_written(
    tmp_path: Path, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save_model(tmp_path / "file" / "model", tiny_model, tiny_tokenizer)
