"""What config.json and the tokenizer of a Llama-family folder, or the metadata of a GGUF file, say about a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.layers import RopeScaling
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE

from .gguf import GGUFFile
from .gguf_tokenizer import adds_bos
from .sources import Source

KINDS = ("llama", "qwen2", "qwen3")
"""`model_type` of config.json and `general.architecture` of GGUF."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "attention_bias",
            "mlp_bias", "tie_word_embeddings", "rope_traditional")  # fmt: skip
OWN_SCALING = (
    "rope_type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
ENDS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
"""How tokens are written that end a text or a turn; a GGUF file names only one of them by its id."""
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


def read_config(source: Source) -> LlamaConfig:
    """Of a folder. Raises UserError for what a Llama of ours has not: sliding windows, other gates and scalings."""
    data, file = source.json(), source.folder / "config.json"
    kind = data.get("model_type")
    if kind not in KINDS:
        raise UserError(f'{file}: model_type is "{kind}", expected one of {", ".join(KINDS)}')
    _refuse(data, str(file))
    fields = {key: data[key] for key in (*SIZES, *OPTIONAL) if data.get(key) is not None}
    fields |= _rope(data, str(file)) | _tokens(source, data)
    fields["qkv_bias"] = data.get("qkv_bias", kind == "qwen2")
    fields["qk_norm"] = data.get("qk_norm", kind == "qwen3")
    return from_dict(LlamaConfig, fields, str(file))


def _refuse(data: Mapping[str, Any], where: str) -> None:
    windows = data.get("use_sliding_window") or "sliding_attention" in (data.get("layer_types") or ())
    for key, wrong in (
        ("hidden_act", data.get("hidden_act", "silu") not in ("silu", "swish")),
        ("use_sliding_window", windows),
        ("partial_rotary_factor", data.get("partial_rotary_factor", 1) != 1),
    ):
        if wrong:
            raise UserError(f"{where}: {key} is {data.get(key)!r}, which a llama model here does not have")


def _rope(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Base and scaling, as older folders (rope_theta, rope_scaling) and newer ones (rope_parameters) say them."""
    said = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    theta = said.get("rope_theta", data.get("rope_theta"))
    kind = said.pop("type", said.get("rope_type", "default"))
    out: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return out
    if kind not in ("linear", "llama3"):
        raise UserError(f'{where}: rope scaling "{kind}" is unknown here, expected default, linear or llama3')
    scaling = {key: said[key] for key in OWN_SCALING if said.get(key) is not None} | {"rope_type": kind}
    return out | {"rope_scaling": scaling}


def _tokens(source: Source, data: Mapping[str, Any]) -> dict[str, Any]:
    """Structural ids: of both config files and of the tokenizer's own words."""
    settings, generation = source.json(TOKENIZER_CONFIG), source.json(GENERATION_CONFIG)
    file = source.tokenizer_files().get(HUGGINGFACE_FILE)
    tokenizer = read_json(file) if isinstance(file, Path) else {}
    words = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}
    size = data.get("vocab_size")

    def named(key: str) -> list[int]:
        word = settings.get(f"{key}_token")
        word = word.get("content") if isinstance(word, dict) else word
        return _ids(words.get(word), size)

    def ids(key: str) -> list[int]:
        return _ids(generation.get(key), size) + _ids(data.get(key), size)

    bos = ids("bos_token_id") or named("bos")
    pad = named("pad") or ids("pad_token_id")
    eos = dict.fromkeys(ids("eos_token_id") + named("eos"))
    adds = data.get("add_bos_token", settings.get("add_bos_token"))
    if not isinstance(adds, bool):
        # The newer tokenizers say it in their last step, and a bare SentencePiece model always has one.
        adds = _begins_with(tokenizer, bos) if tokenizer else True
    return {
        "bos_token_id": bos[0] if bos else None,
        "pad_token_id": pad[0] if pad else None,
        "eos_token_id": list(eos),
        "add_bos_token": adds,
    }


def _ids(value: Any, size: Any) -> list[int]:
    """The ids among `value` (a number, a list, or nothing) that the vocabulary has; folders write -1 for none."""
    given = value if isinstance(value, list) else [value]
    return [i for i in given if type(i) is int and isinstance(size, int) and 0 <= i < size]


def _begins_with(tokenizer: Mapping[str, Any], bos: list[int]) -> bool:
    """Whether the last step of a tokenizer.json puts BOS in front."""
    last = tokenizer.get("post_processor") or {}
    for step in last.get("processors") or [last]:
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
            known = (step.get("special_tokens") or {}).get(first, {}).get("ids", [])
            return bool(bos) and known[:1] == bos[:1]
    return False


def read_gguf(file: GGUFFile) -> LlamaConfig:
    """Of a GGUF file's metadata. Raises UserError for what is missing or is no Llama of ours."""
    data, where = file.metadata, str(file.where)
    arch = data.get("general.architecture")
    if arch not in KINDS:
        raise UserError(f'{where}: general.architecture is "{arch}", expected one of {", ".join(KINDS)}')
    if data.get(f"{arch}.expert_count"):
        raise UserError(f"{where}: is a mixture of experts, which a llama model here does not have")

    def own(key: str) -> Any:
        return data.get(f"{arch}.{key}")

    embedding = file.tensors.get("token_embd.scales") or file.tensors.get("token_embd.weight")
    tokens = data.get("tokenizer.ggml.tokens") or ()
    ids = {key: data.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding")}
    ends = [ids["eos"], *(i for i, token in enumerate(tokens) if token in ENDS)]
    fields: dict[str, Any] = {
        "vocab_size": embedding.shape[0] if embedding else len(tokens),
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": own("attention.head_count_kv"),
        "head_dim": own("attention.key_length"),
        "rms_norm_eps": _short_float(own("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short_float(own("rope.freq_base")),
        "max_position_embeddings": own("context_length"),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "tie_word_embeddings": not {"output.weight", "output.scales"} & file.tensors.keys(),
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["padding"],
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
        "add_bos_token": adds_bos(data),
    }
    config = from_dict(LlamaConfig, {k: v for k, v in fields.items() if v is not None}, where)
    if own("rope.dimension_count") not in (None, config.head_dim):
        raise UserError(
            f"{where}: only a part of each head is rotated, which a llama model here does not have"
        )
    return _scaled(config, file, own("rope.scaling.type"), own("rope.scaling.factor"))


def _short_float(value: Any) -> Any:
    """The shortest number with that float32: 1e-05 in place of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaled(config: LlamaConfig, file: GGUFFile, kind: Any, factor: Any) -> LlamaConfig:
    """The config with the file's rope scaling: named, or as a tensor of factors by frequency (Llama 3)."""
    fields = config.to_dict()
    if kind not in (None, "none", "linear"):
        raise UserError(f'{file.where}: rope scaling "{kind}" is unknown here, expected linear')
    if kind == "linear":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" in file.tensors:
        factors = np.array(file.read("rope_freqs.weight"))
        scaling = RopeScaling("llama3", float(factors.max()))
        plain = config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        expected = np.array(scaling.periods(config.head_dim, config.rope_theta)) / plain
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
            raise UserError(f"{file.where}: rope_freqs.weight is not the scaling of Llama 3")
        fields["rope_scaling"] = {"rope_type": "llama3", "factor": scaling.factor}
    return from_dict(LlamaConfig, fields, str(file.where))
