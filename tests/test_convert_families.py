"""Every registered family: a checkpoint converted and converted back has its bits; quantised, it loads quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import janusflow_tools
import mlx.core as mx
import numpy as np
import pytest
from convert_package import assert_same, bits, module, noise
from mlx.utils import tree_flatten

from mlx_transfusion import generation_memory
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.model_io import build, check_weights, family, read_config, read_weights
from mlx_transfusion.quantization import quantization_of, quantize_like
from mlx_transfusion.tokenizer import Tokenizer

run, sources, families = module("run"), module("sources"), module("families")
table, quantize, synthetic = module("table"), module("quantize"), module("synthetic")
predict = module("predict")
FIXTURES = Path(__file__).parent / "fixtures"
TEXT = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 96, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
}  # fmt: skip
Make = Callable[[Path], Any]


def fixture(name: str, autoencoder: str = "") -> Make:
    """A checkpoint that the repository holds."""

    def make(folder: Path) -> Any:
        shutil.copytree(FIXTURES / name, folder)
        return sources.Source(folder, name, autoencoder=FIXTURES / autoencoder if autoencoder else None)

    return make


def filled(folder: Path, dtype: mx.Dtype) -> Any:
    """A folder of small files, with random weights of the names and shapes that its config asks for."""
    plan = synthetic.plan_from_config(folder)
    for i, (file, entries) in enumerate(synthetic.write_zeros(plan, dtype).items()):
        mx.save_safetensors(
            str(file), {e.source: noise(e.shape, 1000 * i + j, dtype) for j, e in enumerate(entries)}
        )
    return sources.Source(folder, folder.name)


def llama(**changes: Any) -> Make:
    def make(folder: Path) -> Any:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TEXT | changes))
        return filled(folder, mx.bfloat16)

    return make


def janusflow(folder: Path) -> Any:
    coder = janusflow_tools.autoencoder_folder(folder.with_name("vae"))
    return sources.Source(janusflow_tools.official_folder(folder), "janus", autoencoder=coder)


def clip(folder: Path) -> Any:
    folder.mkdir()
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = tower | {"image_size": 16, "patch_size": 8}
    text = tower | {"vocab_size": 64, "max_position_embeddings": 16}
    config = {"model_type": "clip", "projection_dim": 32, "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")  # read by `evaluate`, not by `convert`
    source = sources.Source(folder, "clip")
    wanted = module("clip").entries(module("clip").read_config(source))
    tensors = {e.source: noise(e.shape, i, mx.float16) for i, e in enumerate(wanted)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return source


CASES: dict[str, tuple[str, Make]] = {
    "bagel": ("bagel", fixture("bagel")),
    "janusflow": ("janusflow", janusflow),
    "show-o2": ("show_o2", fixture("show-o2")),
    "llama": ("llama", llama()),
    "qwen2": ("llama", llama(model_type="qwen2", tie_word_embeddings=True)),
    "monoformer": ("monoformer", fixture("monoformer", "kl-sd")),
    "monoformer-clip": ("monoformer", fixture("monoformer-clip", "kl-sd")),
    "lucidrains": ("transfusion_pytorch", fixture("transfusion-pytorch")),
    "lucidrains, options": ("transfusion_pytorch", fixture("transfusion-pytorch-options")),
    "kl-sd": ("autoencoder", fixture("kl-sd")),
    "kl-flux": ("autoencoder", fixture("kl-flux")),
    "clip": ("clip", clip),
    "transfusion": ("transfusion", lambda folder: OURS[0](folder)),
}
OURS: list[Make] = []


@pytest.fixture(scope="module", autouse=True)
def _ours(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    def make(folder: Path) -> Any:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny_config.to_dict()))
        tiny_tokenizer.save(folder)
        return filled(folder, mx.float16)

    OURS[:] = [make]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(family, source)"""
    name, make = CASES[request.param]
    return name, make(tmp_path_factory.mktemp("source") / "checkpoint")


def test_every_family_has_a_case() -> None:
    elsewhere = {"inception", "lpips"}  # of one size, 95 and 10 MB: test_metric_networks.py, test_lpips.py
    assert {name for name, _ in CASES.values()} | elsewhere == {c.name for c in families.converters()}


def test_it_is_found(case: tuple[str, Any]) -> None:
    name, source = case
    assert families.find(source).name == name


def test_converted_and_back(tmp_path: Path, case: tuple[str, Any]) -> None:
    name, source = case
    done = run.plan_of(source, quantize.Options(), name)
    foreign: dict[str, mx.array] = {}
    for job in done.jobs:
        if job.stored or job.entry.same_as:
            foreign[job.entry.source] = job.checkpoint.read(job.name)
        else:
            assert job.entry.reason
    out = run.convert(done, tmp_path / "out")
    stored = read_weights(out)
    back = table.restore(done.plan.entries, stored)
    assert_same({n: v for n, v in back.items() if n in foreign}, foreign)
    assert sum(v.nbytes for v in stored.values()) == done.nbytes
    assert {t.name: (t.shape, t.dtype) for t in done.stored} == {
        n: (v.shape, v.dtype) for n, v in stored.items()
    }


@pytest.mark.parametrize("setting", ["4", "8", "mxfp4"])
def test_quantised_it_loads_quantised(tmp_path: Path, case: tuple[str, Any], setting: str) -> None:
    name, source = case
    done = run.plan_of(source, quantize.Options(setting, 32), name)
    out = run.convert(done, tmp_path / "out")
    if done.plan.model is not None:
        assert done.quantization is None  # an autoencoder and the networks of `evaluate` stay whole
        return
    config, extra = read_config(out)
    assert config == family(config.model_type).config.from_dict(dict(done.plan.config))
    weights, model = read_weights(out), build(config)
    table = extra.get("quantization")
    if table is not None:
        quantize_like(model, weights, table, name)
        assert quantization_of(model) == table
    check_weights(model, weights, name)
    model.load_weights(list(weights.items()))
    whole = table_of_whole(done, source)
    for path, value in tree_flatten(model.parameters()):
        assert bits(value) == bits(weights[path])
        if path in whole and f"{path.removesuffix('weight')}scales" not in weights:
            assert bits(value) == bits(whole[path])  # what is not quantised keeps its bits


def table_of_whole(done: Any, source: Any) -> dict[str, mx.array]:
    """All weights as they would be without quantising."""
    foreign = {job.entry.source: job.checkpoint.read(job.name) for job in done.jobs if job.stored}
    return table.forward(done.plan.entries, foreign)


def test_the_predicted_cache_is_the_one_that_is_filled(case: tuple[str, Any]) -> None:
    name, source = case
    done = run.plan_of(source, quantize.Options(), name)
    if done.config is None:
        assert "memory for generation" not in predict.facts(done)  # none of them generates
        return
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    predicted = generation_memory.numbers_a_token(done.config)
    assert mx.get_peak_memory() - before < 1e5  # shapes alone: no weight is made
    tokens = 3
    _, cache = build(done.config).prefill(np.ones((1, tokens), np.int32), np.array([tokens]))
    mx.eval(cache.layers)
    assert (
        predicted == sum(part.size for layer in cache.layers if layer is not None for part in layer) / tokens
    )
