"""Quantising while converting gives what quantising the whole model gives, and says beforehand what it stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import toy_family
from convert_package import bits, module, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.cli import main
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, read_weights, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.quantization import dequantize, quantization_of, quantize_like
from mlx_transfusion.tokenizer import Tokenizer

account, quantize, run, table = module("account"), module("quantize"), module("run"), module("table")
SETTINGS = st.one_of(
    st.builds(lambda b, g: {"bits": b, "group_size": g}, st.sampled_from(quantize.AFFINE_BITS),
              st.sampled_from(quantize.GROUP_SIZES)),
    st.sampled_from(list(quantize.MODES.values())),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), SETTINGS, st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
def test_what_is_announced_is_stored(
    rows: int, groups: int, setting: dict[str, Any], dtype: mx.Dtype
) -> None:
    matrix = noise((rows, 128 * groups), rows, dtype)
    announced = quantize.stored_parts(matrix.shape, dtype, setting)
    stored = quantize.quantized(matrix, setting)
    assert [(shape, kind) for _, shape, kind in announced] == [(v.shape, v.dtype) for v in stored]


@pytest.mark.parametrize("way", ["2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8"])
def test_it_equals_quantising_the_whole_model(tmp_path: Path, way: str) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in"))
    options = quantize.Options(way, 32)
    out = run.convert(account.account(plan, options), tmp_path / "out")
    model = toy_family.Toy()
    whole = run.convert(account.account(plan, quantize.Options()), tmp_path / "whole")
    model.load_weights(list(read_weights(whole).items()))
    nn.quantize(
        model,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and path in SET[way] and SET[way][path],
    )
    expected = dict(nn.utils.tree_flatten(model.parameters()))
    stored = read_weights(out)
    assert stored.keys() == expected.keys()
    for name in stored:
        assert bits(stored[name]) == bits(expected[name]), name


def settings_of(way: str) -> dict[str, dict[str, Any]]:
    """What the toy's matrices get: layers low, the embedding high, the rest (and rows of 24) whole."""
    low = {"mxfp4": (32, 4, "mxfp4"), "mxfp8": (32, 8, "mxfp8")}.get(way) or (32, int(way), "affine")
    high = {"2": 4, "3": 5, "4": 6, "5": 8, "6": 8, "8": 8, "mxfp4": 6, "mxfp8": 8}[way]
    names = ("group_size", "bits", "mode")
    out = {f"layers.{i}": dict(zip(names, low, strict=True)) for i in range(2)}
    return out | {"embed_tokens": dict(zip(names, (32, high, "affine"), strict=True))}


SET = {way: settings_of(way) for way in ("2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8")}


def test_rows_that_do_not_divide_stay_whole(tmp_path: Path) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in"), precision=lambda _: table.LOW)
    stored = read_weights(run.convert(account.account(plan, quantize.Options("4", 32)), tmp_path / "out"))
    quantised = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    assert quantised == {"embed_tokens", "layers.0", "layers.1"}  # not odd (24 columns), nor patch (12)


def test_scales_have_the_dtype(tmp_path: Path) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in"))
    options = quantize.Options("4", 64, mx.bfloat16)
    stored = read_weights(run.convert(account.account(plan, options), tmp_path / "out"))
    assert {str(v.dtype) for v in stored.values()} == {"mlx.core.uint32", "mlx.core.bfloat16"}


def test_bits_that_there_are_not() -> None:
    for arguments, message in (
        (("7",), 'cannot quantise to "7": expected one of 2, 3, 4, 5, 6, 8, mxfp4, mxfp8'),
        (("four",), 'cannot quantise to "four"'),
        (("4", 48), "cannot quantise in groups of 48: expected 32, 64, 128"),
    ):
        with pytest.raises(UserError, match=message):
            quantize.Options(*arguments)


# ---- our own model ----


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Transfusion, tiny_tokenizer: Tokenizer
) -> Path:
    return save_model(
        tmp_path_factory.mktemp("ours") / "whole", tiny_model, tiny_tokenizer, {"training": {"steps": 7}}
    )


def convert(*flags: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["convert", *map(str, flags)])
    assert done.value.code == 0


@pytest.mark.parametrize("way", ["8", "mxfp4"])
def test_a_folder_of_ours_by_the_command(tmp_path: Path, folder: Path, tiny_config: ModelConfig, way: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    convert(folder, "--output", tmp_path / "small", "-q", way, "--group-size", 32)
    assert capsys.readouterr().out == f"{tmp_path / 'small'}\n"
    loaded = load(tmp_path / "small")
    assert loaded.config == tiny_config
    assert loaded.extra == {"training": {"steps": 7}}  # quantised weights are expanded on the CPU
    whole = read_weights(folder)
    for name, value in nn.utils.tree_flatten(loaded.model.parameters()):
        error = mx.abs(value - whole[name]).max() / mx.abs(whole[name]).max()
        assert error.item() < {"8": 0.02, "mxfp4": 0.3}[way]
        if not name.startswith(("layers.", "embed_tokens", "lm_head")):
            assert error.item() == 0  # patches and angles stay as they are
    assert (
        'mlx-transfusion generate "a red heart" --model small'
        in (tmp_path / "small" / "README.md").read_text()
    )


def test_a_quantised_folder_keeps_its_bits_and_is_not_quantised_again(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(folder, "--output", tmp_path / "small", "--quantize", "4", "--group-size", 32)
    convert(tmp_path / "small", "--output", tmp_path / "copy")
    first, second = read_weights(tmp_path / "small"), read_weights(tmp_path / "copy")
    assert first.keys() == second.keys()
    assert all(bits(first[name]) == bits(second[name]) for name in first)
    tables = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization"] for n in ("small", "copy")
    ]
    assert tables[0] == tables[1]
    assert tables[0]["lm_head"] == {"group_size": 32, "bits": 6}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "small"), "-o", str(tmp_path / "again"), "-q", "4"])
    assert stop.value.code == 2
    assert "quantised already" in capsys.readouterr().err


def test_settings_of_single_modules_survive_loading_and_saving(tmp_path: Path, folder: Path,
                                                               tiny_tokenizer: Tokenizer) -> None:  # fmt: skip
    convert(folder, "--output", tmp_path / "small", "--quantize", "mxfp4", "--group-size", 32)
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization"]
    assert stored["mode"] == "mxfp4"
    assert stored["embed_tokens"] == {"group_size": 32, "bits": 6}
    weights = read_weights(tmp_path / "small")
    model = Transfusion(load(tmp_path / "small").transfusion.config)
    quantize_like(model, weights, stored, "here")
    model.load_weights(list(weights.items()))
    assert quantization_of(model) == stored
    again = read_weights(save_model(tmp_path / "again", model, tiny_tokenizer))
    assert all(bits(again[name]) == bits(weights[name]) for name in weights)
    assert dequantize(model)
    assert quantization_of(model) is None


WRONG = (
    4, {"bits": 4}, {"bits": "4", "group_size": 32}, {"bits": True, "group_size": 32},
    {"bits": 4, "group_size": 32, "mode": 1}, {"bits": 4, "group_size": 32, "mode": "x"},
    {"bits": 4, "group_size": 32, "lm_head": 3}, {"bits": 7, "group_size": 32},
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tables(tiny_config: ModelConfig, wrong: Any) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        quantize_like(Transfusion(tiny_config), {"lm_head.scales"}, wrong, "here")
