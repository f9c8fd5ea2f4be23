"""A model as its difference from another: the mathematics, the files, and every verb on such a folder."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten

from mlx_transfusion import lora, model_path
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.lora_extract import Extracted, extract
from mlx_transfusion.model_io import flat_parameters, load, load_config, save_model
from mlx_transfusion.models.transfusion import Transfusion, with_painter
from mlx_transfusion.quantization import quantize
from mlx_transfusion.tokenizer import Tokenizer, train_sentencepiece

OBJECTIVE = {"name": "consistency", "method": "scd", "teacher": "0" * 16, "guidance": 3.0, "angles": [1.1]}
FULL_RANK = 288
"""No matrix of the tiny model has more directions."""
STILL = "layers.1.mlp.up_proj.weight"
"""The student keeps this one of its teacher's matrices."""


def flat(model: Transfusion) -> dict[str, np.ndarray]:
    return {k: np.array(v.astype(mx.float32)) for k, v in flat_parameters(model).items()}


def distance(one: Transfusion, other: Transfusion) -> float:
    """Frobenius norm of the difference of all weights."""
    a, b = flat(one), flat(other)
    return float(sum(np.square(a[k] - b[k]).sum() for k in a) ** 0.5)


def moved(model: Transfusion, seed: int = 7, size: float = 0.05) -> Transfusion:
    """A copy of the model with noise on every weight but STILL."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    weights = [
        (name, value if name == STILL else value + size * mx.random.normal(value.shape, key=next(keys)))
        for name, value in flat_parameters(model).items()
    ]
    copy = Transfusion(model.config)
    copy.update(tree_unflatten(weights))
    return copy


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> Path:
    """A teacher and its student beside each other; tests write into folders of their own."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "teacher", tiny_model, tiny_tokenizer)
    save_model(folder / "student", moved(tiny_model), tiny_tokenizer, extra={"objective": OBJECTIVE})
    return folder


@pytest.fixture
def pair(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "pair"))


def made(pair: Path, rank: int = 4, name: str = "adapter", **more: Any) -> Extracted:
    return extract(pair / "teacher", pair / "student", rank, pair / name, **more)


def rewrite(file: Path, **change: Any) -> None:
    """Change keys of a JSON file; ... takes one away."""
    data = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def rewrite_arrays(pair: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    file = pair / "adapter" / "adapters.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(file), arrays)


# ---- the mathematics ----


@settings(deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_no_other_matrix_of_that_rank_is_nearer(rows: int, columns: int, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, columns))
    a, b = lora.factors(matrix, rank)
    best = np.linalg.norm(matrix - a @ b)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert best == pytest.approx(np.linalg.norm(singular[rank:]), abs=1e-9)  # Eckart and Young
    assert np.linalg.matrix_rank(a @ b) <= rank
    for _ in range(5):
        # Any columns at all with the rows that suit them best, and a step away from the best ones.
        for other in (random.normal(size=a.shape), a + 0.1 * random.normal(size=a.shape)):
            nearest = np.linalg.lstsq(other, matrix, rcond=None)[0]
            assert best <= np.linalg.norm(matrix - other @ nearest) + 1e-9


def test_the_factors_are_of_one_size() -> None:
    matrix = 1e-6 * np.random.default_rng(0).normal(size=(40, 30))
    a, b = lora.factors(matrix, 5)
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b))
    assert np.abs(a).min() > 6e-8  # in float16 it would be lost otherwise


def test_a_linear_layer_multiplies_its_input_by_the_factors(pair: Path) -> None:
    made(pair)
    arrays = mx.load(str(pair / "adapter" / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    base, fused = load(pair / "teacher").model, load(pair / "adapter").model
    x = mx.random.normal((3, 32), key=mx.random.key(1))
    for name in ("q_proj", "k_proj"):  # square ones, in which a transpose would go unnoticed
        a, b = (arrays[f"layers.0.self_attn.{name}.lora_{k}"].astype(mx.float32) for k in "ab")
        expected = base.layers[0].self_attn[name](x) + (x @ a) @ b
        np.testing.assert_allclose(fused.layers[0].self_attn[name](x), expected, atol=1e-5)
    ids = mx.array([4, 200])
    a, b = (arrays[f"embed_tokens.lora_{k}"].astype(mx.float32) for k in "ab")
    np.testing.assert_allclose(fused.embed_tokens(ids), base.embed_tokens(ids) + a[ids] @ b, atol=1e-5)


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    """A kernel [outputs, height, width, inputs] that is a sum of two products is stored in two directions."""
    random = np.random.default_rng(0)
    kernel = np.einsum("or,rhwi->ohwi", random.normal(size=(16, 2)), random.normal(size=(2, 3, 3, 8)))
    layer = nn.Conv2d(8, 16, 3)
    part = lora.layout(layer, 2)["weight"]
    assert list(part.arrays.values()) == [(16, 2), (2, 72)]
    stored = lora.pack(kernel, part)
    assert {name: value.shape for name, value in stored.items()} == part.arrays
    np.testing.assert_allclose(lora.unpack(stored, part), kernel, atol=0.01)


# ---- what comes back ----


def test_all_directions_give_the_student_back(pair: Path) -> None:
    report = made(pair, FULL_RANK)
    teacher, student, fused = (load(pair / k).model for k in ("teacher", "student", "adapter"))
    assert distance(fused, student) < 1e-3 * distance(teacher, student)
    assert report.lost < 1e-3


def test_the_error_falls_with_the_rank_and_is_the_reported_one(pair: Path) -> None:
    teacher, student = (load(pair / k).model for k in ("teacher", "student"))
    errors = []
    for rank in (1, 2, 4, 8):
        report = made(pair, rank, f"rank-{rank}")
        error = distance(load(report.folder).model, student) / distance(teacher, student)
        assert report.lost == pytest.approx(error, rel=1e-3)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4
    assert errors[0] < 1


def test_loading_equals_adding_by_hand(pair: Path) -> None:
    made(pair)
    base = load(pair / "teacher").model
    arrays = {k: np.array(v).astype(np.float32) for k, v in _arrays(pair / "adapter").items()}
    got = flat(load(pair / "adapter").model)
    for name, value in flat(base).items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" in arrays:
            product = arrays[f"{layer}.lora_a"] @ arrays[f"{layer}.lora_b"]
            expected = value + (product if name == "embed_tokens.weight" else product.T)
        else:
            key = f"{name[:-5]}.diff_b" if name.endswith(".bias") else f"{layer}.diff"
            expected = value + arrays.get(key, np.float32(0))
        np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def _arrays(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def test_size_and_names_are_as_documented(pair: Path) -> None:
    report = made(pair, 4)
    arrays = _arrays(pair / "adapter")
    assert {v.dtype for v in arrays.values()} == {mx.float16}
    weights = {k: v.shape for k, v in flat(load(pair / "teacher").model).items() if k != STILL}
    numbers = 0
    for shape in weights.values():
        whole = int(np.prod(shape))
        numbers += whole if len(shape) == 1 else min(4 * sum(shape), whole)
    assert sum(v.nbytes for v in arrays.values()) == 2 * numbers
    file = report.folder / "adapters.safetensors"
    assert report.bytes == file.stat().st_size < 2 * numbers + 20_000  # names and shapes
    assert report.model_bytes == (pair / "student" / "model.safetensors").stat().st_size
    assert "norm.diff" in arrays
    assert "angle_embedding.fc1.diff_b" in arrays
    assert not any("up_proj" in name and "layers.1" in name for name in arrays)  # STILL
    config = json.loads((pair / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "model": "../teacher",
        "model_fingerprint": load(pair / "teacher").fingerprint,
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "scale": 1.0},
        "config": {},
        "unchanged": [STILL],
        "objective": OBJECTIVE,
    }
    assert not [p for p in report.folder.iterdir() if "partial" in p.name]


def test_a_smaller_scale_adds_less(pair: Path) -> None:
    made(pair, FULL_RANK)
    whole = load(pair / "adapter")
    before = whole.fingerprint
    rewrite(pair / "adapter" / "adapter_config.json", lora_parameters={"rank": FULL_RANK, "scale": 0.5})
    half = load(pair / "adapter")
    base = load(pair / "teacher").model
    assert distance(half.model, base) == pytest.approx(0.5 * distance(whole.model, base), rel=1e-5)
    assert half.fingerprint != before


def test_the_fingerprint_tells_adapters_and_bases_apart(pair: Path) -> None:
    made(pair, 2, "two")
    made(pair, 3, "three")
    made(pair, 2, "two-again")
    prints = {k: load(pair / k).fingerprint for k in ("teacher", "two", "three", "two-again")}
    assert prints["two"] == prints["two-again"]
    assert len(set(prints.values())) == 3
    assert all(len(p) == 16 for p in prints.values())


def test_what_the_student_predicts_may_differ_from_its_teacher(
    pair: Path, make_model: Callable[..., Transfusion], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    noise = dataclasses.replace(tiny_config, prediction="epsilon")
    save_model(pair / "teacher", make_model(noise), tiny_tokenizer)
    made(pair)
    config = json.loads((pair / "adapter" / "adapter_config.json").read_text())
    assert config["config"] == {"prediction": "velocity"}
    assert load(pair / "adapter").config == load(pair / "adapter").model.config == tiny_config
    assert load_config(pair / "adapter") == tiny_config


def test_quantised_models(
    pair: Path, make_model: Callable[..., Transfusion], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    """The difference is from what the stored numbers stand for, and the sum has no quantisation any more."""
    save_model(
        pair / "teacher", quantize(make_model(tiny_config), bits=4, group_size=32), tiny_tokenizer, None,
        mx.float16,
    )  # fmt: skip
    made(pair, FULL_RANK)
    fused = load(pair / "adapter")
    student = load(pair / "student").model
    assert distance(fused.model, student) < 1e-3 * distance(load(pair / "teacher").model, student)
    assert set(fused.extra) == {"objective"}


def test_other_precision(pair: Path) -> None:
    made(pair)
    model = load(pair / "adapter", dtype=mx.float16).model
    assert {v.dtype for v in flat_parameters(model).values()} == {mx.float16}


def test_an_adapter_of_an_adapter_is_made_from_the_whole(pair: Path) -> None:
    made(pair, FULL_RANK)
    again = extract(pair / "teacher", pair / "adapter", 2, pair / "again")
    assert again.lost == pytest.approx(made(pair, 2, "direct").lost, rel=1e-3)
    with pytest.raises(UserError, match="base adapter is an adapter itself"):
        extract(pair / "adapter", pair / "student", 2, pair / "more")


# ---- where the base is ----


def test_both_folders_can_move_together(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(pair)
    before = load(pair / "adapter").fingerprint
    pair.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert load("elsewhere/adapter").fingerprint == before
    assert load("elsewhere/adapter").name == "adapter"


def test_the_current_folder_has_no_say(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundled model's name means the bundled model, whatever lies around."""
    bundled = pair / "bundled"
    bundled.mkdir()
    (pair / "teacher").rename(bundled / "emoji")
    monkeypatch.setattr(model_path.resources, "files", lambda package: pair)
    extract("emoji", pair / "student", 2, pair / "adapter")
    assert json.loads((pair / "adapter" / "adapter_config.json").read_text())["model"] == "emoji"
    (pair / "work" / "emoji").mkdir(parents=True)
    monkeypatch.chdir(pair / "work")
    assert load(pair / "adapter").extra == {"objective": OBJECTIVE}


def test_a_whole_model_is_no_adapter(pair: Path) -> None:
    made(pair)
    shutil.copy(pair / "adapter" / "adapter_config.json", pair / "student")
    assert load(pair / "student").fingerprint != load(pair / "adapter").fingerprint


# ---- what is wrong is said ----


def test_another_base(
    pair: Path, make_model: Callable[..., Transfusion], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    made(pair)
    right = load(pair / "teacher").fingerprint
    save_model(pair / "teacher", make_model(tiny_config, 5), tiny_tokenizer)
    with pytest.raises(UserError) as caught:
        load(pair / "adapter")
    assert f"belongs to ../teacher with weights {right}" in str(caught.value)
    assert f"has weights {load(pair / 'teacher').fingerprint}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_base(pair: Path) -> None:
    made(pair)
    shutil.rmtree(pair / "teacher")
    with pytest.raises(
        UserError, match=r"adapter: the base of this adapter is not to be had: .*\.\./teacher"
    ):
        load(pair / "adapter")


def test_a_base_that_is_an_adapter(pair: Path) -> None:
    made(pair)
    rewrite(pair / "adapter" / "adapter_config.json", model=".")
    with pytest.raises(UserError, match="is an adapter itself"):
        load(pair / "adapter")


def remove(arrays: dict[str, mx.array]) -> None:
    del arrays["norm.diff"], arrays["lm_head.lora_a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "missing lm_head.lora_a; missing norm.diff"),
        (lambda a: a.update(surplus=mx.zeros((1,))), "unexpected surplus"),
        (
            lambda a: a.update({"layers.1.mlp.up_proj.diff": mx.zeros((64, 32))}),
            "unexpected layers.1.mlp.up_proj.diff",
        ),
        (
            lambda a: a.update({"lm_head.lora_b": mx.zeros((4, 9))}),
            "lm_head.lora_b has shape [4, 9], expected [4, 288]",
        ),
        (
            lambda a: a.update({"norm.diff": mx.zeros((1,))}),
            "norm.diff has shape [1], expected [32]",
        ),
    ],
)
def test_arrays_that_do_not_fit(
    pair: Path, change: Callable[[dict[str, mx.array]], Any], message: str
) -> None:
    made(pair)
    rewrite_arrays(pair, change)
    with pytest.raises(UserError) as caught:
        load(pair / "adapter")
    assert message in str(caught.value)
    assert "does not fit its base ../teacher" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ...}, 'key "model" is missing'),
        ({"fingerprint": "0"}, 'unknown key "fingerprint"; did you mean "model_fingerprint"?'),
        ({"fine_tune_type": "full"}, 'fine_tune_type is "full", expected one of lora, dora'),
        ({"fine_tune_type": "dora"}, "lora_parameters.keys is missing"),
        ({"lora_parameters": {"rank": 0}}, "rank is 0: use at least 1"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "scale is nan, expected a number"),
        ({"lora_parameters": {"rank": 5}}, "has shape [32, 4], expected [32, 5]"),
        ({"unchanged": ["nothing.at.all"]}, "unchanged what is no parameter: nothing.at.all"),
        ({"unchanged": []}, "missing layers.1.mlp.up_proj.lora_a"),
        ({"config": {"hiden_size": 3}}, 'adapter_config.json: config: unknown key "hiden_size"'),
        ({"config": {"hidden_size": 64}}, "the weights do not fit the config"),
        ({"objective": 3}, "objective: expected a table of keys, found 3"),
    ],
)
def test_a_bad_adapter_config(pair: Path, change: dict[str, Any], message: str) -> None:
    made(pair)
    rewrite(pair / "adapter" / "adapter_config.json", **change)
    with pytest.raises(UserError) as caught:
        load(pair / "adapter")
    assert message in str(caught.value)


def test_broken_files(pair: Path) -> None:
    made(pair)
    file = pair / "adapter" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="corrupt weights"):
        load(pair / "adapter")
    file.unlink()
    with pytest.raises(UserError, match=r"weights are missing: adapters\.safetensors"):
        load(pair / "adapter")
    (pair / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(pair / "adapter")


def test_pairs_that_are_none(
    pair: Path, tmp_path: Path, make_model: Callable[..., Transfusion], tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    wide = dataclasses.replace(tiny_config, intermediate_size=96)
    save_model(pair / "wide", make_model(wide), tiny_tokenizer)
    with pytest.raises(
        UserError, match=r"wide has not the shape of its base teacher: layers\.0\.mlp\.down_proj"
    ):
        extract(pair / "teacher", pair / "wide", 2, pair / "out")
    with pytest.raises(UserError, match="no difference to store"):
        extract(pair / "teacher", pair / "teacher", 2, pair / "out")
    train_sentencepiece(["one two three four five six seven"] * 9, tmp_path / "tokenizer.model", 277)
    save_model(pair / "foreign", make_model(tiny_config, 3), tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="different tokenizers"):
        extract(pair / "teacher", pair / "foreign", 2, pair / "out")
    broken = make_model(tiny_config, 3)
    broken.norm.weight = broken.norm.weight * float("nan")
    save_model(pair / "broken", broken, tiny_tokenizer)
    with pytest.raises(UserError, match=r"differ in norm\.weight by more than float16 holds"):
        extract(pair / "teacher", pair / "broken", 2, pair / "out")
    assert not (pair / "out").exists()


def test_files_that_are_there_stay(pair: Path) -> None:
    first = made(pair, 2)
    before = {p.name: p.read_bytes() for p in first.folder.iterdir()}
    with pytest.raises(UserError, match="holds an adapter already"):
        made(pair, 3)
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == before
    assert made(pair, 3, overwrite=True).lost < first.lost
    assert load(pair / "adapter").extra == {"objective": OBJECTIVE}
    with pytest.raises(UserError, match="holds a whole model"):
        made(pair, 3, "student", overwrite=True)
    (pair / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        made(pair, 3, "file")
    with pytest.raises(UserError, match="--rank is 0: use at least 1"):
        made(pair, 0)


def test_a_full_disk_leaves_nothing_half(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[save] Unable to write 12 bytes to file.")

    monkeypatch.setattr("mlx.core.save_safetensors", full)
    with pytest.raises(UserError, match=r"cannot write the adapter: .*Unable to write"):
        made(pair)
    assert list((pair / "adapter").iterdir()) == []


# ---- the command line ----


def test_extract_and_paint(pair: Path, cli: Callable[..., Any]) -> None:
    """An adapter of a consistency model paints as one, with what it recorded, and again from its picture."""
    flags = ("--base", pair / "teacher", "--model", pair / "student", "--rank", FULL_RANK)
    done = cli("lora", "extract", *flags, "--output", pair / "small")
    assert (done.code, done.out) == (0, f"{pair / 'small'}\n")
    assert "MB of the whole model; 0.0% of the difference is left out" in done.err
    picture = pair / "heart.png"
    done = cli("generate", "red heart", "--model", pair / "small", "--seed", 3, "--output", picture, "--json")
    assert done.code == 0, done.err
    settings = json.loads(done.out)["settings"]
    assert settings["model"] == "small"
    assert settings["model_hash"] == load(pair / "small").fingerprint
    assert (settings["sampler"], settings["steps"], settings["angles"]) == ("consistency", 2, [1.1])
    assert settings["objective"] == OBJECTIVE
    again = pair / "again.png"
    done = cli("generate", "--from", picture, "--model", pair / "small", "--output", again)
    assert (done.code, done.err.count("warning")) == (0, 0)
    from PIL import Image

    painted, repeated = (np.array(Image.open(p)) for p in (picture, again))
    np.testing.assert_array_equal(painted, repeated)
    cli("generate", "red heart", "--model", pair / "student", "--seed", 3, "--output", pair / "whole.png")
    whole = np.array(Image.open(pair / "whole.png")).astype(int)
    assert np.abs(painted.astype(int) - whole).max() <= 2  # float16


def test_other_verbs(pair: Path, cli: Callable[..., Any]) -> None:
    made(pair)
    done = cli("info", pair / "adapter", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["objective"] == OBJECTIVE
    assert facts["parameters"]["total"] == sum(v.size for v in flat(load(pair / "teacher").model).values())
    done = cli("complete", "red", "--model", pair / "adapter", "--max-tokens", 3, "--max-images", 0)
    assert done.code == 0, done.err


@pytest.mark.parametrize("verb", [["lora"], ["lora", "extract"]])
def test_help_needs_no_mlx(verb: list[str]) -> None:
    code = (
        "import sys; from mlx_transfusion.cli import _run; _run(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'mlx.core')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout


def test_the_hub_gives_all_files_of_an_adapter(pair: Path) -> None:
    names = [p.name for p in made(pair).folder.iterdir()]
    assert names
    assert all(any(fnmatch.fnmatch(name, wanted) for wanted in model_path.HUB_FILES) for name in names)


def test_bad_flags(pair: Path, cli: Callable[..., Any]) -> None:
    flags = ["--base", pair / "teacher", "--model", pair / "student", "--output", pair / "out"]
    for extra, message in (
        (["--rank", "0"], "error: --rank is 0: use at least 1"),
        (["--rank", "many"], "error: Invalid value for '--rank'"),
        (["--base", pair / "nowhere"], "does not exist"),
    ):
        done = cli("lora", "extract", *flags, *extra)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1
    assert "--base" in cli("lora", "extract", "--model", pair / "student", "--output", "x").err
    done = cli("lora", "extract", *flags, "--json")
    assert json.loads(done.out)["rank"] == 32


def test_a_painter_is_stored_beside_its_base(pair: Path) -> None:
    """The base has no painter: the adapter holds what the painter's weights are more than the base's own."""
    base = load(pair / "teacher")
    student = with_painter(base.model)
    layer = student.painter.layers[0].mlp.up_proj
    layer.weight = layer.weight + 0.1 * mx.random.normal(layer.weight.shape, key=mx.random.key(1))
    save_model(pair / "painter", student, base.tokenizer, {"objective": OBJECTIVE})
    stored = extract(pair / "teacher", pair / "painter", FULL_RANK, pair / "beside")
    arrays = mx.load(str(pair / "beside" / "adapters.safetensors"))
    assert set(arrays) == {"painter.layers.0.mlp.up_proj.diff"}
    assert stored.lost < 1e-3
    again = load(pair / "beside")
    assert again.config.painter
    assert again.extra["objective"] == OBJECTIVE
    assert distance(again.model, student) < 1e-3 * distance(again.model, with_painter(base.model))
