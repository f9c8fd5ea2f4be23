"""GGUF files: headers that lie, blocks against mlx's own reader, and a whole model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf_tools as gguf
import llama_tools as tools
import mlx.core as mx
import numpy as np
import pytest
from convert_package import assert_same, module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_transfusion import model_io
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.layers import RopeScaling
from mlx_transfusion.models.llama import Llama, LlamaConfig
from mlx_transfusion.tokenizer import SpecialIds, Tokenizer

reader, blocks, words, llama = (module(name) for name in ("gguf", "gguf_blocks", "gguf_tokenizer", "llama"))
run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))


def metadata(config: LlamaConfig, arch: str = "llama") -> dict[str, Any]:
    sizes = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    return {
        "general.architecture": arch,
        "general.name": "Tiny",
        "general.license": "mit",
        **{f"{arch}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tools.pieces(),
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 256,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": tools.TEMPLATE,
    } | {"tokenizer.ggml.tokens": [*tools.pieces(), "ab"], "tokenizer.ggml.token_type": [3] * 3 + [1] * 257}


def model(arch: str = "llama", **changes: Any) -> Llama:
    return tools.random_llama(tools.config(vocab_size=tools.VOCAB + 1, hidden_size=64, **changes))


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp has them: pair i of a head in rows 2i and 2i + 1."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], 2).reshape(weight.shape)


def tensors(
    source: Llama, arch: str = "llama", kinds: dict[str, int] | None = None
) -> tuple[dict[str, gguf.Tensor], dict[str, mx.array]]:
    """The model as llama.cpp stores it, and what its weights then stand for under our names."""
    c, out, exact = source.config, {}, {}
    for name, value in flat_parameters(source).items():
        path, _, part = name.rpartition(".")
        array = np.array(value)
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.kv_heads}.get(path.rpartition(".")[2], 0)
        turned = paired(array, heads) if heads and arch == "llama" else array
        kind = (kinds or {}).get(path.rpartition(".")[2])
        target = f"{llama.gguf_name(path)}.{part}"
        if kind is None or part != "weight":
            out[target], exact[name] = gguf.plain(turned), value
        else:
            out[target], means = gguf.quantised(turned, kind)
            back = means.reshape(heads, -1, 2, array.shape[1]).transpose(0, 2, 1, 3) if heads else means
            exact[name] = mx.array(back.reshape(array.shape))
    return out, exact


def converted(file: Path, output: Path, **options: Any) -> model_io.Loaded:
    return model_io.load(run.convert(run.plan_of(sources.Source(file), quantize.Options(**options)), output))


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
    ],
)
def test_plain_model_is_the_same_bit_for_bit(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = model(arch, **changes)
    file = gguf.write_gguf(tmp_path / "tiny.gguf", metadata(source.config, arch), tensors(source, arch)[0])
    loaded = converted(file, tmp_path / "out")
    # Of the file's two ids that end a text it names one; the other is known by how it is written.
    assert loaded.config == replace(source.config, eos_token_id=(2, 0))
    assert_same(flat_parameters(loaded.model), flat_parameters(source))
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text()


def test_quantised_blocks_stay_as_they_are(tmp_path: Path) -> None:
    source = model()
    kinds = {"embed_tokens": gguf.Q8_0, "q_proj": gguf.Q4_1, "k_proj": gguf.Q4_0, "o_proj": gguf.Q4_1}
    kinds |= {"up_proj": gguf.Q4_0, "down_proj": gguf.Q8_0}
    stored, exact = tensors(source, kinds=kinds)
    file = gguf.write_gguf(tmp_path / "tiny.gguf", metadata(source.config), stored)
    loaded = converted(file, tmp_path / "out")  # expanded: this is a CPU
    weights = flat_parameters(loaded.model)
    for name, value in exact.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    packed = model_io.read_weights(tmp_path / "out")
    assert packed["model.layers.0.mlp.down_proj.weight"].shape == (64, 16)  # 8 bits of 64 numbers
    assert packed["model.layers.0.self_attn.q_proj.weight"].shape == (64, 8)  # 4 bits
    table = model_io.read_json(tmp_path / "out" / "config.json")["quantization"]
    assert table["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    with pytest.raises(UserError, match="quantised already"):
        converted(file, tmp_path / "other", quantize="4")


@given(st.integers(0, 2**32 - 1), st.sampled_from([gguf.Q4_0, gguf.Q4_1, gguf.Q8_0, gguf.Q6_K]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_blocks_as_mlx_reads_them(tmp_path: Path, seed: int, kind: int) -> None:
    """Random bytes in every field but the scales, which stay finite."""
    random, form = np.random.default_rng(seed), blocks.TYPES[kind]
    data = random.integers(0, 256, (6, form.nbytes), np.uint8)
    scales = random.normal(0, 0.1, (6, 2)).astype(np.float16).view(np.uint8).reshape(6, 4)
    at = {gguf.Q6_K: 208}.get(kind, 0)
    width = 2 if kind in (gguf.Q4_0, gguf.Q8_0, gguf.Q6_K) else 4
    data[:, at : at + width] = scales[:, :width]
    tensor = (kind, (3, 2 * form.size), data.tobytes())
    file = gguf.write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"x.weight": tensor})
    theirs, ours = mx.load(str(file)), reader.GGUFFile(file)
    assert ours.tensors.keys() == theirs.keys()
    for name, expected in theirs.items():
        mine = ours.read(name)
        assert (mine.dtype, mine.shape) == (expected.dtype, ours.tensors[name].shape)
        np.testing.assert_array_equal(np.array(mine), np.array(expected), err_msg=name)


@pytest.mark.parametrize(("kind", "begin"), [(gguf.Q4_K, 16), (gguf.Q5_K, 48)])
def test_k_blocks_by_their_definition(kind: int, begin: int) -> None:
    """Number by number: mlx's own reader takes the scale of 32 numbers of Q4_K for the next 32 too."""
    random, form = np.random.default_rng(0), blocks.TYPES[kind]
    data = random.integers(0, 256, (2, form.nbytes), np.uint8)
    data[:, :4] = random.normal(0, 0.1, (2, 2)).astype(np.float16).view(np.uint8)
    for block, row in zip(data, form.whole(data), strict=True):
        d, least = (float(x) for x in block[:4].view(np.float16))
        packed = [int(x) for x in block[4:16]]
        for i in range(256):
            part, byte = i // 32, int(block[begin + i // 64 * 32 + i % 32])
            if part < 4:
                scale, low = packed[part] & 63, packed[part + 4] & 63
            else:
                scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
                low = packed[part + 4] >> 4 | packed[part] >> 6 << 4
            q = byte >> 4 if part % 2 else byte & 15
            if kind == gguf.Q5_K:
                q += (int(block[16 + i % 32]) >> part & 1) * 16
            assert row[i] == pytest.approx(d * scale * q - least * low, rel=2e-3, abs=2e-3)


def test_llama3_scaling_is_found_in_its_factors(tmp_path: Path) -> None:
    source = model(rope_theta=500000.0)
    c = source.config
    scaling = RopeScaling("llama3", 32.0)
    plain = c.rope_theta ** (np.arange(0, c.head_dim, 2) / c.head_dim)
    factors = np.array(scaling.periods(c.head_dim, c.rope_theta)) / plain
    assert len(set(factors.round(3))) > 2  # short waves stay, long ones are stretched, one lies between
    stored = tensors(source)[0]
    right = stored | {"rope_freqs.weight": gguf.plain(factors)}
    found = llama.plan(sources.Source(gguf.write_gguf(tmp_path / "a.gguf", metadata(c), right)))
    assert found.config["rope_scaling"] == asdict(scaling)
    wrong = stored | {"rope_freqs.weight": gguf.plain(np.linspace(1, 9, c.head_dim // 2))}
    with pytest.raises(UserError, match="not the scaling of Llama 3"):
        llama.plan(sources.Source(gguf.write_gguf(tmp_path / "b.gguf", metadata(c), wrong)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, 'architecture is "gemma"'),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 4}, "only a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, 'rope scaling "yarn"'),
        ({"llama.block_count": 3}, "missing blk.2.attn_k.weight"),
        ({"llama.embedding_length": "wide"}, "expected int"),
        ({"tokenizer.ggml.model": "bert"}, 'kind "bert"'),
        ({"tokenizer.ggml.pre": "falcon"}, 'splits text as "falcon"'),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "do not fit each other"),
        ({"tokenizer.ggml.merges": ["a"]}, "cannot be built"),
    ],
)
def test_models_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = model()
    file = gguf.write_gguf(tmp_path / "tiny.gguf", metadata(source.config) | change, tensors(source)[0])
    with pytest.raises(UserError, match=message):
        run.plan_of(sources.Source(file), quantize.Options(), "llama")


@given(st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_files_give_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """Cut off anywhere, or with bytes changed anywhere in front of the numbers: an error, or a verified file."""
    tensor = gguf.quantised(np.arange(64.0).reshape(2, 32), gguf.Q4_1)[0]
    whole = bytearray(
        gguf.gguf_bytes({"general.architecture": "llama", "list": ["a", "b"], "n": 7}, {"x.weight": tensor})
    )
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.gguf"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    said = str(file)
    try:
        found = reader.GGUFFile(file)
        for name in found.tensors:
            assert found.read(name).shape == found.tensors[name].shape
    except UserError as error:
        said = str(error)
    assert said.startswith(str(file))
    assert "\n" not in said


def special() -> SpecialIds:
    return SpecialIds(pad=None, bos=1, eos=2, unk=None, boi=None, eoi=None)


def saved(files: dict[str, bytes], folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    return Tokenizer.load(folder, special())


@pytest.mark.parametrize(
    ("pre", "expected"),
    [("gpt-2", ["12345"]), ("smollm", list("12345")), ("qwen2", list("12345")), ("llama-bpe", ["123", "45"])],
)
def test_numbers_are_split_as_the_model_learned(pre: str, expected: list[str], tmp_path: Path) -> None:
    merges = ["1 2", "12 3", "4 5", "123 45"]
    tokens = [*tools.pieces(), *(m.replace(" ", "") for m in merges)]
    said = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": merges,
    }  # fmt: skip
    made = saved(words.tokenizer_files(said, "x"), tmp_path)
    assert [tokens[i] for i in made.encode("12345")] == expected
    text = "a <|im_end|> of\n  it: äöü 12 345 日本!"
    assert made.decode(made.encode(text)) == text
    assert 2 not in made.encode(text)


def test_sentencepiece_tokens_as_sentencepiece_itself(tmp_path: Path) -> None:
    """A BPE model trained by the library, told to a GGUF file by its pieces and scores."""
    import sentencepiece

    corpus = [
        "the red heart of the green star",
        "blue cats and dogs read the stars",
        "hearts are red, 12 345",
    ] * 20
    prefix = tmp_path / "spm"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus), model_prefix=str(prefix), vocab_size=330, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    count = range(sp.get_piece_size())
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in count]
    said = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in count], "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip
    made = saved(words.tokenizer_files(said, "x"), tmp_path)
    for text in ("the red heart", "  two  spaces", "stars, 12", "größe 日本", "read dogs\nof"):
        assert made.encode(text) == sp.encode(text), text
        assert made.decode(made.encode(text)) == text
