from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama_tools import config as llama_config
from llama_tools import random_llama
from mlx.utils import tree_flatten
from tiny_training import write_run

from mlx_transfusion import lora
from mlx_transfusion.adapters import load_adapted, parse, with_adapters
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Token
from mlx_transfusion.finetune.fuse import fuse
from mlx_transfusion.finetune.layers import AdaptedLinear, Gate, flat_trained, insert, plain_weight, targets
from mlx_transfusion.foreign_lora import read_foreign
from mlx_transfusion.interleave import complete
from mlx_transfusion.lora import linear_layers
from mlx_transfusion.model_io import flat_parameters, load, read_weights, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.painting import paint
from mlx_transfusion.quantization import quantization_of, quantize
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import AdapterTraining, TrainConfig, load_train_config
from mlx_transfusion.training.prefix_data import prefix_of
from mlx_transfusion.training.step import to_arrays
from mlx_transfusion.training.trainer import Trainer, train

Make = Callable[..., Transfusion]
SETTINGS = GenerationSettings(steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer, make_model: Make,
           tiny_config: ModelConfig) -> Path:  # fmt: skip
    """Rows to train on and two models to start from: `base` and `other`."""
    folder = tmp_path_factory.mktemp("adapters")
    write_run(folder, tiny_tokenizer)
    for seed, name in enumerate(("base", "other")):
        save_model(folder / name, make_model(tiny_config, seed=seed), tiny_tokenizer)
    return folder


def run_config(folder: Path, output: Path, **changes: Any) -> TrainConfig:
    """Six steps of LoRA on `base`; `changes` go into the [adapter] table or over the whole config."""
    config = load_train_config(folder / "train.toml", [f"output={output}"])
    names = {f.name for f in dataclasses.fields(AdapterTraining)}
    spec = AdapterTraining(**{"rank": 4} | {k: v for k, v in changes.items() if k in names})
    rest = {k: v for k, v in changes.items() if k not in names}
    return dataclasses.replace(config, model=None, init=str(folder / "base"), adapter=spec, **rest)


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, Path]:
    """Trained adapters of `base` by name."""
    kinds: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"type": "dora"},
        "image": {"modality": "image"},
    }
    return {name: train(run_config(folder, folder / name, **changes)) for name, changes in kinds.items()}


def words(loaded: Any, prompt: str) -> str:
    settings = GenerationSettings(max_tokens=12, max_images=0, temperature=1.0)
    return "".join(e.text for e in complete(loaded, prompt, 3, settings) if isinstance(e, Token))


def picture(model: Any, seed: int = 1) -> np.ndarray:
    c = model.config
    return np.array(paint(model, [[c.bos_token_id, 9, c.boi_token_id]], [seed], SETTINGS))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_fresh_adapter_changes_nothing(
    make_model: Make, tiny_config: ModelConfig, kind: str, bits: int | None
) -> None:
    model = make_model(tiny_config)
    if bits is not None:
        quantize(model, bits, 32)
    before = picture(model)
    names = insert(model, AdapterTraining(type=kind), 0, Gate())
    assert len(names) == 14  # seven matrices in each of two blocks
    # DoRA divides each row's length by itself.
    np.testing.assert_allclose(picture(model), before, rtol=1e-4, atol=1e-5)
    if kind == "lora":
        np.testing.assert_array_equal(picture(model), before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_matrix_that_it_says(kind: str, bias: bool) -> None:
    """The layer's output is that of the matrix in the equations of lora.py, here by numpy."""
    plain = nn.Linear(6, 5, bias=bias)
    if bias:
        plain.bias = mx.random.normal((5,), key=mx.random.key(4))
    spec = AdapterTraining(type=kind, rank=3, scale=1.7)
    layer = AdaptedLinear(plain, spec, mx.random.key(0), Gate(), True)
    layer.lora_b = mx.random.normal((3, 5), key=mx.random.key(1))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    w = np.array(plain.weight) + 1.7 * (np.array(layer.lora_a) @ np.array(layer.lora_b)).T
    if kind == "dora":
        layer.m = layer.m * 1.3
        w = w * (np.array(layer.m) / np.linalg.norm(w, axis=1))[:, None]
    expected = x @ w.T + (np.array(plain.bias) if bias else 0)
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, rtol=2e-4, atol=2e-5)
    arrays = {f"k.{name}": layer[name] for name in ("lora_a", "lora_b", "m") if name in layer}
    config = lora.AdapterConfig("b", lora.LoraParameters(3, 1.7, ("k",)), "", fine_tune_type=kind)
    np.testing.assert_allclose(
        np.array(lora.adapted(plain_weight(plain), "k", config, arrays)), w, rtol=2e-4, atol=2e-5
    )


def test_targets_by_pattern_and_block(tiny_model: Transfusion) -> None:
    assert targets(tiny_model, AdapterTraining(targets=("*.q_proj",))) == [
        "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"
    ]  # fmt: skip
    last = targets(tiny_model, AdapterTraining(layers=1))
    assert last
    assert all(name.startswith("layers.1.") for name in last)
    with pytest.raises(UserError, match=r"no linear layer matches the targets \*\.nothing"):
        targets(tiny_model, AdapterTraining(targets=("*.nothing",)))
    with pytest.raises(UserError, match="lm_head, which only text passes"):
        targets(tiny_model, AdapterTraining(targets=("lm_head",), modality="image"))


@pytest.mark.parametrize("name", ["lora", "dora", "image"])
def test_training_reaches_the_adapter_and_leaves_the_base(
    folder: Path, adapters: dict[str, Path], name: str
) -> None:
    arrays = mx.load(str(adapters[name] / "adapters.safetensors"))
    moved = [
        key for key, value in arrays.items() if key.endswith("lora_b") and np.abs(np.array(value)).max() > 0
    ]
    assert len(moved) == 14
    adapted = load(adapters[name])
    assert not np.array_equal(picture(adapted.model), picture(load(folder / "base").model))
    assert adapted.config.painter == (name == "image")


def test_an_image_only_adapter_leaves_text_and_reading_bit_for_bit(
    folder: Path, adapters: dict[str, Path]
) -> None:
    base, adapted = load(folder / "base"), load_adapted(folder / "base", [str(adapters["image"])])
    both = load_adapted(folder / "base", [str(adapters["lora"])])
    ids, lengths = np.array([[1, 9, 10, 11, 12]]), np.array([5])
    pixels = mx.random.uniform(shape=(1, 8, 8, 3), key=mx.random.key(0))

    def read(loaded: Any) -> tuple[np.ndarray, np.ndarray]:
        logits, cache = loaded.model.prefill(ids, lengths)
        return np.array(logits), np.array(loaded.pictures.read_picture(pixels, cache))

    for ours, theirs in zip(read(base), read(adapted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert words(base, "red cat") == words(adapted, "red cat")
    # The test can fail: an adapter of both modalities changes the text.
    assert not np.array_equal(read(base)[0], read(both)[0])


def test_the_trained_forward_is_what_generation_does(folder: Path, adapters: dict[str, Path]) -> None:
    """The gated pass of training gives the loss that the loaded model with its painter has by `paint`."""
    trainer = Trainer(run_config(folder, folder / "image", modality="image"))
    assert trainer.resume()
    documents = [d for d in trainer.train_data.documents(0, 6) if len(d.images) == 1][:1]
    prefix = prefix_of(documents[0])
    assert prefix is not None
    arrays = to_arrays(trainer.train_data.batch(documents), trainer.model)[0]
    trainer.model.update(trainer.state.ema)
    ours = np.array(trainer.step.forward(arrays)[1][0])
    loaded = load(adapters["image"])
    _, cache = loaded.model.prefill(np.array([prefix]), np.array([len(prefix)]))
    theirs = np.array(loaded.pictures.velocity(arrays.patches, arrays.angle, cache))
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(np.array(trainer.base.gate.tokens is None), True)  # type: ignore[union-attr]


def test_resume_is_exact(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for name, changes in (("lora", {}), ("image", {"modality": "image"})):
        short = Trainer(run_config(folder, tmp_path / name, **changes))
        short.config = dataclasses.replace(short.config, steps=6)
        loads = iter(range(100))
        plain = short._train_step

        def stop_after_four(*args: Any, plain: Any = plain, loads: Any = loads) -> bool:
            return plain(*args) or next(loads) == 3

        short._train_step = stop_after_four  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            short.run()
        resumed = train(run_config(folder, tmp_path / name, **changes))
        for file in ("adapters.safetensors", "train.safetensors", "optimizer.safetensors"):
            whole, parts = (mx.load(str(path / file)) for path in (adapters[name], resumed))
            assert whole.keys() == parts.keys()
            for key in whole:
                np.testing.assert_array_equal(
                    np.array(whole[key]), np.array(parts[key]), err_msg=f"{name} {file} {key}"
                )


def test_gradient_checkpointing_changes_nothing(
    folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    done = train(run_config(folder, tmp_path / "checkpointed", gradient_checkpointing=True))
    whole, parts = (mx.load(str(path / "train.safetensors")) for path in (adapters["lora"], done))
    for key in whole:
        np.testing.assert_allclose(np.array(whole[key]), np.array(parts[key]), rtol=1e-4, atol=1e-6)


def test_qlora_trains_on_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(run_config(folder, tmp_path / "q", quantize=8))
    assert quantization_of(trainer.model) == {"group_size": 32, "bits": 8}
    before = {k: np.array(v) for k, v in flat_parameters(trainer.model).items()}
    last = trainer.run()
    trained = set(flat_trained(trainer.model, trainer.base.names))  # type: ignore[union-attr]
    for key, value in flat_parameters(trainer.model).items():
        if key not in trained:
            np.testing.assert_array_equal(np.array(value), before[key])
    assert not np.array_equal(picture(load(last).model), picture(load(folder / "base").model))


def test_scales_and_several_adapters(folder: Path, adapters: dict[str, Path]) -> None:
    base = flat_parameters(load(folder / "base").model)
    one, two = (flat_parameters(load(adapters[name]).model) for name in ("lora", "dora"))
    mixed = load_adapted(folder / "base", [f"{adapters['lora']}:0.5", f"{adapters['dora']}:2"])
    key = "layers.1.mlp.up_proj.weight"
    expected = base[key] + 0.5 * (one[key] - base[key]) + 2 * (two[key] - base[key])
    np.testing.assert_allclose(
        np.array(flat_parameters(mixed.model)[key]), np.array(expected), rtol=1e-4, atol=1e-6
    )
    assert mixed.extra["adapters"] == [
        {"name": adapters["lora"].name, "scale": 0.5}, {"name": adapters["dora"].name, "scale": 2.0}
    ]  # fmt: skip
    prints = {load_adapted(folder / "base", [f"{adapters['lora']}:{s}"]).fingerprint for s in (1, 0.5)}
    assert len(prints | {load(folder / "base").fingerprint}) == 3
    nothing = load_adapted(folder / "base", [f"{adapters['lora']}:0"])
    np.testing.assert_array_equal(picture(nothing.model), picture(load(folder / "base").model))


def test_fuse(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for name in ("lora", "image"):
        out = fuse(folder / "base", [str(adapters[name])], tmp_path / name)
        np.testing.assert_allclose(
            picture(load(out).model), picture(load(adapters[name]).model), rtol=1e-4, atol=1e-5
        )
    same = fuse(adapters["lora"], [], tmp_path / "alone")
    np.testing.assert_array_equal(picture(load(same).model), picture(load(adapters["lora"]).model))
    with pytest.raises(UserError, match="nothing to fuse"):
        fuse(folder / "base", [], tmp_path / "none")


def test_fuse_into_a_quantised_model(folder: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, make_model: Make,
                                     tiny_config: ModelConfig) -> None:  # fmt: skip
    save_model(tmp_path / "q", quantize(make_model(tiny_config), 8, 32), tiny_tokenizer)
    adapter = train(dataclasses.replace(run_config(folder, tmp_path / "a"), init=str(tmp_path / "q")))
    again = fuse(tmp_path / "q", [str(adapter)], tmp_path / "again")
    plain = fuse(tmp_path / "q", [str(adapter)], tmp_path / "plain", dequantize=True)
    assert json.loads((again / "config.json").read_text())["quantization"] == {"group_size": 32, "bits": 8}
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    assert {k for k in read_weights(again) if k.endswith(".scales")} == {
        k for k in read_weights(tmp_path / "q") if k.endswith(".scales")
    }
    wanted = picture(load_adapted(tmp_path / "q", [str(adapter)]).model)
    np.testing.assert_allclose(picture(load(plain).model), wanted, rtol=1e-4, atol=1e-5)
    # Eight bits are near, and not the same.
    assert 0 < np.abs(picture(load(again).model) - wanted).max() < 0.2 * np.abs(wanted).max()


def test_an_adapter_of_another_base(folder: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"belongs to .* use it with the model it was made for") as caught:
        load_adapted(folder / "other", [str(adapters["lora"])])
    assert str(adapters["lora"]) in str(caught.value)


def test_what_is_no_adapter(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such adapter"):
        load_adapted(folder / "base", [str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match='the scale is "much"'):
        load_adapted(folder / "base", [f"{adapters['lora']}:much"])
    with pytest.raises(UserError, match="is no adapter"):
        load_adapted(folder / "base", [str(folder / "other")])
    assert parse(f"{adapters['lora']}:0.25") == (adapters["lora"], 0.25)


# ---- LoRA files of other programs ----


def write_foreign(path: Path, names: dict[str, str], rank: int = 2) -> dict[str, np.ndarray]:
    """PEFT arrays for layers (their name -> ours); returns the difference of each of our matrices."""
    rng, arrays, differences = np.random.default_rng(0), {}, {}
    for theirs, ours in names.items():
        size = (64, 32) if "up_proj" in ours else (32, 32)
        a, b = rng.normal(size=(rank, size[1])), rng.normal(size=(size[0], rank))
        arrays[theirs.format("A")], arrays[theirs.format("B")] = (
            mx.array(x.astype(np.float32)) for x in (a, b)
        )
        differences[ours] = b @ a
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), arrays)
    return differences


@pytest.mark.parametrize(
    "pattern",
    [
        "base_model.model.{}.lora_{{}}.weight",
        "base_model.model.{}.lora_{{}}.default.weight",
        "transformer.{}.lora_{{}}.weight",
        "{}.lora_{{}}.weight",
    ],
)
def test_a_peft_lora_loads(folder: Path, tmp_path: Path, pattern: str) -> None:
    layers = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
    names = {pattern.format(layer): layer for layer in layers}
    differences = write_foreign(tmp_path / "peft" / "adapter_model.safetensors", names)
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"})
    )
    base = flat_parameters(load(folder / "base").model)
    made = flat_parameters(load_adapted(folder / "base", [f"{tmp_path / 'peft'}:0.5"]).model)
    for layer in layers:
        expected = np.array(base[f"{layer}.weight"]) + 0.5 * 3 * differences[layer]
        np.testing.assert_allclose(np.array(made[f"{layer}.weight"]), expected, rtol=1e-4, atol=1e-4)
    changed = {k for k in base if not np.array_equal(np.array(base[k]), np.array(made[k]))}
    assert changed == {f"{layer}.weight" for layer in layers}


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.0\..*"])
def test_peft_gives_a_layer_an_alpha_of_its_own(folder: Path, tmp_path: Path, pattern: str) -> None:
    layers = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
    names = {f"base_model.model.{layer}.lora_{{}}.weight": layer for layer in layers}
    differences = write_foreign(tmp_path / "peft" / "adapter_model.safetensors", names)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({"r": 2, "lora_alpha": 6, "alpha_pattern": {pattern: 1}}))
    base = flat_parameters(load(folder / "base").model)
    made = flat_parameters(load_adapted(folder / "base", [str(tmp_path / "peft")]).model)
    for layer, factor in zip(layers, (0.5, 3), strict=True):
        difference = np.array(made[f"{layer}.weight"]) - np.array(base[f"{layer}.weight"])
        np.testing.assert_allclose(difference, factor * differences[layer], rtol=1e-4, atol=1e-4)
    file.write_text(json.dumps({"alpha_pattern": {"(": 1}}))
    with pytest.raises(UserError, match=r"alpha_pattern in adapter_config\.json cannot be read"):
        load_adapted(folder / "base", [str(tmp_path / "peft")])


def test_a_kohya_lora_loads(folder: Path, tmp_path: Path) -> None:
    down, up = np.ones((2, 32), np.float32), np.full((32, 2), 0.5, np.float32)
    stem = "lora_unet_layers_1_self_attn_o_proj"
    file = tmp_path / "style.safetensors"
    mx.save_safetensors(str(file), {
        f"{stem}.lora_down.weight": mx.array(down), f"{stem}.lora_up.weight": mx.array(up),
        f"{stem}.alpha": mx.array(1.0),
    })  # fmt: skip
    base = load(folder / "base").transfusion.layers[1].self_attn.o_proj.weight
    made = load_adapted(folder / "base", [str(file)]).transfusion.layers[1].self_attn.o_proj.weight
    np.testing.assert_allclose(np.array(made - base), 0.5 * up @ down, rtol=1e-4, atol=1e-5)


def test_a_foreign_lora_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_foreign(file, {"unet.down_blocks.0.to_q.lora_{}.weight": "q"})
    with pytest.raises(UserError, match="none of its 1 layers is in model"):
        load_adapted(folder / "base", [str(file)])
    write_foreign(
        file,
        {"layers.0.self_attn.q_proj.lora_{}.weight": "q", "layers.7.self_attn.q_proj.lora_{}.weight": "x"},
    )
    with pytest.raises(UserError, match="1 of its 2 layers are not in model"):
        load_adapted(folder / "base", [str(file)])
    write_foreign(file, {"layers.0.mlp.up_proj.lora_{}.weight": "q"})
    with pytest.raises(UserError, match="32 inputs and 32 outputs, the model's has 32 and 64"):
        load_adapted(folder / "base", [str(file)])
    mx.save_safetensors(str(file), {"layers.0.self_attn.q_proj.lora_A.weight": mx.zeros((2, 32))})
    with pytest.raises(UserError, match="only one half"):
        load_adapted(folder / "base", [str(file)])
    mx.save_safetensors(str(file), {"conv_in.weight": mx.zeros((2, 32))})
    with pytest.raises(UserError, match="not a plain LoRA"):
        load_adapted(folder / "base", [str(file)])


def test_the_bundled_student_keeps_its_fingerprint_and_takes_an_adapter_of_its_teacher(
    tmp_path: Path,
) -> None:
    # As pictures that it painted carry it, and examples/emoji/distances.json.
    assert load("emoji-2step").fingerprint == "0e0f5794bc2ec2d1"
    teacher = load("emoji")
    key = "layers.0.self_attn.q_proj"
    arrays = {f"{key}.lora_a": mx.ones((256, 1)), f"{key}.lora_b": 0.01 * mx.ones((1, 256))}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    config = lora.AdapterConfig("emoji", lora.LoraParameters(1, 1.0, (key,)), teacher.fingerprint)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    student = load("emoji-2step")
    before = dict(tree_flatten(student.model.parameters()))
    after = dict(tree_flatten(load_adapted("emoji-2step", [str(tmp_path)]).model.parameters()))
    for place in (f"{key}.weight", f"painter.{key}.weight"):
        np.testing.assert_allclose(np.array(after[place] - before[place]), 0.01, rtol=1e-2)


# ---- converted families ----


def test_adapters_of_a_language_model(tmp_path: Path) -> None:
    """A PEFT LoRA goes into a Llama; a fresh adapter of ours changes nothing; image-only has no place."""
    model = random_llama(llama_config())
    ids, lengths = np.array([[1, 5, 7]]), np.array([3])
    before = np.array(model.prefill(ids, lengths)[0])
    layer = next(n for n in sorted(linear_layers(model)) if n.endswith("layers.1.self_attn.o_proj"))
    weight = dict(tree_flatten(model.parameters()))[f"{layer}.weight"]
    outputs, inputs = weight.shape
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, inputs)), rng.normal(size=(outputs, 2))
    file = tmp_path / "l.safetensors"
    names = {f"base_model.model.{layer}.lora_{half}.weight": x for half, x in (("A", a), ("B", b))}
    mx.save_safetensors(str(file), {name: mx.array(x.astype(np.float32)) for name, x in names.items()})
    part, _ = read_foreign(file, model, "tiny")
    adapted = with_adapters(model, [part])
    made = dict(tree_flatten(adapted.parameters()))[f"{layer}.weight"]
    np.testing.assert_allclose(np.array(made), np.array(weight) + b @ a, rtol=1e-4, atol=1e-4)
    assert not np.allclose(np.array(adapted.prefill(ids, lengths)[0]), before)
    with pytest.raises(UserError, match="image-only adapter is for models of type transfusion"):
        with_adapters(model, [part._replace(image_only=True)])
    fresh = random_llama(llama_config())
    insert(fresh, AdapterTraining(rank=2), 0, Gate())
    np.testing.assert_array_equal(np.array(fresh.prefill(ids, lengths)[0]), before)
