from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlx_transfusion.config import PRESETS, ModelConfig, from_dict, preset
from mlx_transfusion.errors import UserError

SMALL: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


def test_there_and_back() -> None:
    config = ModelConfig(**SMALL, image_mean=(0.1, 0.2, 0.3), qk_norm=True, num_key_value_heads=2)
    data = config.to_dict()
    assert isinstance(data["image_mean"], list)
    assert ModelConfig.from_dict(data) == config
    assert set(data) == {f.name for f in dataclasses.fields(ModelConfig)}


def test_derived_sizes() -> None:
    config = ModelConfig(**SMALL, image_height=16, image_width=32, patch_size=8, num_key_value_heads=2)
    assert (config.patches_per_image, config.patch_dim) == (8, 3 * 64)
    assert (config.kv_heads, config.head_dim) == (2, 8)
    assert ModelConfig(**SMALL).kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": -4}, "vocab_size is -4"),
        ({"hidden_size": 36}, "hidden_size 36 must be an even multiple of num_attention_heads 4"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "even multiple"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "multiple of num_key_value_heads 0"),
        ({"num_key_value_heads": -2}, "multiple of num_key_value_heads -2"),
        ({"patch_size": 5}, "cannot be cut into patches of 5"),
        ({"image_width": 36}, "image 36x32 cannot be cut"),
        ({"image_channels": 4}, "image_mean has 3 values, expected one for each of the 4"),
        ({"image_std": 0.0}, "image_std is 0.0, expected a positive number"),
        ({"image_std": float("nan")}, "image_std is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"max_position": 0}, "max_position is 0"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected one of silu, relu'),
        ({"prediction": "x0"}, 'prediction is "x0", expected one of epsilon, velocity'),
        ({"patch_positions": "sine"}, "patch_positions"),
        ({"eoi_token_id": 16}, r"eoi_token_id is 16, expected 0 to vocab_size - 1 \(15\)"),
        ({"boi_token_id": -1}, "boi_token_id is -1"),
    ],
)
def test_impossible_models_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        ModelConfig(**(SMALL | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hiden_size": 32}, r'config.json: unknown key "hiden_size"; did you mean "hidden_size"\?'),
        ({"zzz": 1}, 'unknown key "zzz"; known keys: '),
        ({"hidden_size": "32"}, "hidden_size: expected int, found '32'"),
        ({"hidden_size": 32.0}, "hidden_size: expected int, found 32.0"),
        ({"hidden_size": True}, "hidden_size: expected int, found True"),
        ({"qk_norm": 1}, "qk_norm: expected bool, found 1"),
        ({"image_mean": 0.5}, "image_mean: expected a list, found 0.5"),
        ({"image_mean": [0.5, "a", 1]}, r"image_mean\[1\]: expected float, found 'a'"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: expected int"),
        ({"hidden_size": None}, "hidden_size: expected int, found None"),
    ],
)
def test_strict_reading(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(SMALL | data)


def test_missing_keys_are_named() -> None:
    data = dict(SMALL)
    del data["num_hidden_layers"]
    with pytest.raises(UserError, match='here: key "num_hidden_layers" is missing'):
        ModelConfig.from_dict(data, "here")
    with pytest.raises(UserError, match="expected a table of keys, found list"):
        ModelConfig.from_dict([1])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inner:
    size: int = 3
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Outer:
    inners: tuple[Inner, ...]
    table: dict
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)
    maybe: Inner | None = None


def test_nested_tables() -> None:
    read = from_dict(
        Outer, {"inners": [{"size": 1}, {"pair": [1, 2]}], "table": {"x": [1]}, "maybe": {"size": 9}}, "f"
    )
    assert read == Outer((Inner(1), Inner(3, (1.0, 2.0))), {"x": [1]}, maybe=Inner(9))
    assert isinstance(read.inners[1].pair[0], float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inners": [{"siz": 1}]}, r'f: inners\[0\]: unknown key "siz"; did you mean "size"\?'),
        ({"inner": {"size": "x"}}, "f: inner: size: expected int"),
        ({"inner": 3}, "f: inner: expected a table of keys, found int"),
        ({"table": 3}, "f: table: expected a table of keys, found 3"),
        ({"inner": {"pair": [1]}}, r"f: inner: pair: expected a list of 2, found \[1\]"),
        ({"inner": {"pair": [1, 2, 3]}}, "expected a list of 2"),
        ({"names": "abc"}, "f: names: expected a list, found 'abc'"),
        ({"names": ["a", 1]}, r"f: names\[1\]: expected str"),
    ],
)
def test_nested_faults_are_located(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, {"inners": [], "table": {}} | changes, "f")


def test_presets() -> None:
    assert list(PRESETS) == ["0.16b", "0.37b", "0.76b", "1.4b", "7b"]
    seven = preset("7b")
    assert (seven.num_hidden_layers, seven.hidden_size, seven.head_dim, seven.patch_dim) == (
        32,
        4096,
        128,
        32,
    )
    with pytest.raises(UserError, match=r'preset "8b" is unknown, expected one of 0\.16b'):
        preset("8b")
