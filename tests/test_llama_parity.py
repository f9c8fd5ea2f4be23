"""Random tiny models of transformers, converted: the same logits, alone and through the cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import llama_tools as tools
import numpy as np
import pytest
from convert_package import module
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="compares with PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

from mlx_transfusion import model_io  # noqa: E402

run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))
KINDS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SCALINGS = [None, {"rope_type": "linear", "factor": 2.5}, LLAMA3]


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind of model, and the fields of its config."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    kv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([4, 8, 10]))
    fields = {
        "vocab_size": tools.VOCAB,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "hidden_size": kv * group * head_dim,
        "intermediate_size": draw(st.integers(8, 40)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    rope = {"rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6]))}
    scaling = draw(st.sampled_from(SCALINGS))
    if int(transformers.__version__.split(".")[0]) >= 5:
        fields["rope_parameters"] = rope | (scaling or {"rope_type": "default"})
    else:
        fields |= rope | {"rope_scaling": scaling}
    if kind != "qwen2" and draw(st.booleans()):  # Qwen2's heads share the width
        fields |= {"head_dim": 2 * head_dim}
    elif kind == "qwen3":
        fields |= {"head_dim": head_dim}
    if kind == "llama":
        fields |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return kind, fields


@given(configs(), st.integers(0, 2**16))
@settings(deadline=None, max_examples=12)
def test_converted_models_equal_transformers(drawn: tuple[str, dict[str, Any]], seed: int) -> None:
    kind, fields = drawn
    torch.manual_seed(seed)
    name = KINDS[kind]
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**fields)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms begin as constants
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = np.random.default_rng(seed).integers(0, tools.VOCAB, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    with tempfile.TemporaryDirectory() as top:
        folder = tools.write_tokenizer(Path(top) / "hf")
        theirs.save_pretrained(folder)
        plan = run.plan_of(sources.Source(folder), quantize.Options())
        model = model_io.load(run.convert(plan, Path(top) / "ours")).model
    scale = np.abs(expected).max()
    first, cache = model.prefill(ids[:, :7], np.array([7, 5]))
    np.testing.assert_allclose(first, [expected[0, 6], expected[1, 4]], atol=2e-5 * scale)
    rest = model.extend_text(np.stack([ids[0, 7:12], ids[1, 5:10]]), np.array([5, 5]), cache)
    np.testing.assert_allclose(rest, [expected[0, 11], expected[1, 9]], atol=2e-5 * scale)
