"""The Llama family: its cache, its options, its folders."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import llama_tools as tools
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from convert_package import assert_same, module
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion import model_io
from mlx_transfusion.errors import UserError
from mlx_transfusion.interleave import complete
from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.layers import RopeScaling
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.settings import GenerationSettings

convert = module("llama")
run, quantize, sources, table = (module(name) for name in ("run", "quantize", "sources", "table"))
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "own head": {"tie_word_embeddings": False, "head_dim": 16},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 12, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "rope_traditional": True},
    "llama3": {"rope_scaling": LLAMA3},
}


def close(a: mx.array, b: mx.array, tolerance: float = 2e-5) -> bool:
    return bool(mx.allclose(a, b, rtol=tolerance, atol=tolerance))


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_in_parts_equals_reading_at_once(variant: str) -> None:
    model = tools.random_llama(tools.config(**VARIANTS[variant]))
    ids = np.random.default_rng(0).integers(0, tools.VOCAB, (2, 9))
    whole = model(mx.array(ids))
    logits, cache = model.prefill(ids[:, :5], np.array([5, 3]))  # rows of different length
    assert close(logits, mx.stack([whole[0, 4], whole[1, 2]]))
    logits = model.extend_text(np.stack([ids[0, 5:9], ids[1, 3:7]]), np.array([4, 2]), cache)
    assert close(logits, mx.stack([whole[0, 8], whole[1, 4]]))
    logits = model.extend_text(ids[1:, 5:6], np.array([1]), cache.select([1]))
    assert close(logits[0], whole[1, 5])


def test_options_change_the_output() -> None:
    """So that none of them is read and then forgotten."""
    ids = mx.array([[5, 9, 200, 7, 31]])
    base = tools.random_llama(tools.config())
    for change in (
        {"rope_traditional": True},
        {"rope_scaling": LLAMA3},
        {"rope_theta": 100.0},
        {"hidden_act": "relu"},
    ):
        other = tools.random_llama(tools.config(**change))
        other.update(base.parameters())
        assert not close(other(ids), base(ids), 1e-3), change


def test_linear_scaling_divides_positions() -> None:
    plain = tools.random_llama(tools.config())
    scaled = tools.random_llama(tools.config(rope_scaling=RopeScaling("linear", 4.0)))
    scaled.update(plain.parameters())
    x = mx.random.normal((1, 4, 1, 8), key=mx.random.key(0))
    a, b = plain.model.layers[0].self_attn, scaled.model.layers[0].self_attn
    assert close(a._rotate(x, 3), b._rotate(x, 12))


@given(st.floats(1, 64), st.floats(0.5, 4), st.floats(1.1, 8), st.integers(16, 1 << 17), st.floats(100, 1e6))
@settings(deadline=None, max_examples=50)
def test_llama3_scaling_by_its_definition(
    factor: float, low: float, ratio: float, length: int, theta: float
) -> None:
    high, e = low * ratio, 16
    periods = np.array(RopeScaling("llama3", factor, low, high, length).periods(e, theta))
    for i, period in enumerate(periods):
        plain = theta ** (2 * i / e)
        wave = 2 * math.pi * plain
        if wave < length / high:
            expected = plain
        elif wave > length / low:
            expected = plain * factor
        else:
            smooth = (length / wave - low) / (high - low)
            expected = 1 / ((1 - smooth) / (plain * factor) + smooth / plain)
        assert period == pytest.approx(expected, rel=1e-3)


def test_half_precision_stays_half_beside_full_norms() -> None:
    model = tools.random_llama(tools.config())
    weights = flat_parameters(model)
    model.load_weights([(n, v if "norm" in n else v.astype(mx.float16)) for n, v in weights.items()])
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "expected an even number"),
        ({"hidden_size": 0}, "expected a positive number"),
        ({"hidden_act": "gelu"}, "expected silu or relu"),
        ({"rope_scaling": RopeScaling("yarn", 2.0)}, "expected linear or llama3"),
        ({"rope_scaling": RopeScaling("llama3", 2.0, 4.0, 4.0)}, "low_freq_factor"),
        ({"eos_token_id": (99999,)}, "outside the vocabulary"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tools.config(**change)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_its_file(variant: str) -> None:
    config = tools.config(**VARIANTS[variant])
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def converted(source: Path, output: Path, **options: Any) -> Path:
    return run.convert(run.plan_of(sources.Source(source), quantize.Options(**options)), output)


@pytest.mark.parametrize(("kind", "variant"), [("llama", "llama"), ("llama", "own head"), ("llama", "llama3"),
                                               ("qwen2", "qwen2"), ("qwen3", "qwen3")])  # fmt: skip
def test_folder_of_hugging_face(kind: str, variant: str, tmp_path: Path) -> None:
    config = tools.config(**VARIANTS[variant])
    model = tools.random_llama(config)
    folder = tools.hf_folder(tmp_path / "hf", config, model, kind)
    loaded = model_io.load(converted(folder, tmp_path / "ours"))
    assert dataclasses.replace(loaded.config, pad_token_id=None) == config
    assert_same(flat_parameters(loaded.model), flat_parameters(model))
    again = model_io.load(converted(tmp_path / "ours", tmp_path / "again"))  # ours is a source too
    assert again.config == loaded.config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("paired", [False, True])
def test_the_table_reads_backwards(variant: str, paired: bool) -> None:
    config = tools.config(**VARIANTS[variant])
    rows = convert.entries(config, gguf=paired, paired=paired)
    foreign = {
        e.source: mx.random.normal(e.shape, key=mx.random.key(i)) for i, e in enumerate(rows) if e.target
    }
    ours = table.forward(rows, foreign)
    assert ours.keys() == flat_parameters(tools.random_llama(config)).keys()
    back = table.restore(rows, ours)
    if config.tie_word_embeddings:
        back.pop("lm_head.weight", None)  # comes back as a copy
    assert_same(back, foreign)


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = tools.random_llama(tools.config())
    folder = tools.hf_folder(tmp_path / "hf", model.config, model)
    weights = flat_parameters(model)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | head)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        converted(folder, tmp_path / "ours")


def test_folder_of_mlx_lm_stays_quantised(tmp_path: Path) -> None:
    model = tools.random_llama(tools.config())
    usual = {"group_size": 32, "bits": 4}
    table = usual | {"model.embed_tokens": usual | {"bits": 8}}
    folder = tools.hf_folder(tmp_path / "mlx", model.config, model, quantization=table)

    def setting(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 32, "bits": 8 if "embed" in path else 4}

    nn.quantize(model, class_predicate=setting)
    mx.save_safetensors(str(folder / "model.safetensors"), flat_parameters(model))
    out = converted(folder, tmp_path / "ours")
    assert_same(model_io.read_weights(out), flat_parameters(model))
    ids = mx.array([[5, 9, 200]])
    assert close(model_io.load(out).model(ids), model(ids), 1e-4)  # expanded on the CPU, quantised elsewhere
    with pytest.raises(UserError, match="quantised already"):
        converted(folder, tmp_path / "other", quantize="4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 'rope scaling "yarn"'),
        ({"num_hidden_layers": 3}, r"missing model.layers.2.input_layernorm.weight"),
        ({"hidden_size": "wide"}, "expected int"),
    ],
)
def test_folders_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tools.random_llama(tools.config())
    folder = tools.hf_folder(tmp_path / "hf", model.config, model, **change)
    with pytest.raises(UserError, match=message):
        converted(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_ends_of_both_config_files_and_bos_of_the_last_step(tmp_path: Path) -> None:
    model = tools.random_llama(tools.config())
    folder = tools.hf_folder(tmp_path / "hf", model.config, model)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2], "bos_token_id": 1}')
    made = tools.tokenizer()
    import tokenizers

    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    config = model_io.read_config(converted(folder, tmp_path / "ours"))[0]
    assert config.layout.eos == (0, 2)
    assert config.layout.bos == 1


def test_a_language_model_completes(tmp_path: Path) -> None:
    model = tools.random_llama(tools.config())
    loaded = model_io.load(
        converted(tools.hf_folder(tmp_path / "hf", model.config, model), tmp_path / "ours")
    )
    for images in (0, 4):  # it cannot paint, whatever is asked for
        events = list(complete(loaded, "a red heart", 0, GenerationSettings(max_tokens=5, max_images=images)))
        assert events[-1].reason == "length"
    with pytest.raises(UserError, match="only writes text"):
        assert loaded.pictures
