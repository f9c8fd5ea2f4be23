"""Llama and its relatives as Hugging Face, mlx-lm and llama.cpp store them: folders, and single GGUF files.

Our parameter names are Hugging Face's, so the table is the identity but for GGUF, which has names of its own and, of
its "llama" architecture, stores rotary pairs of q and k side by side: their rows go back into two halves. Matrices
that are quantised already stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.quantization import quantization_table
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE

from .gguf import GGUFFile
from .gguf_tokenizer import tokenizer_files
from .llama_config import KINDS, read_config, read_gguf
from .quantize import stored_parts
from .sources import GGUF, Source
from .table import IDENTITY, Card, Converter, Entry, Plan, Shape, rope_rows, unused, vector

FAMILY = "llama"
GROUP = 32
"""Numbers of a GGUF block."""
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
COMPUTED = "computed from the config"

Setting = Mapping[str, Any]


class Module(NamedTuple):
    """A matrix (perhaps with a bias) or, without `rows`, a norm."""

    path: str
    """Ours, and Hugging Face's."""
    columns: int
    rows: int = 0
    bias: bool = False
    heads: int = 0
    """Of q and k: how many heads are rotated."""


def modules(config: LlamaConfig) -> Iterator[Module]:
    """All that has weights, in the order of the forward pass."""
    d, f, e, o = config.hidden_size, config.intermediate_size, config.head_dim, config.options
    heads, kv = config.num_attention_heads, config.kv_heads
    yield Module("model.embed_tokens", d, config.vocab_size)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        yield Module(f"{at}.input_layernorm", d)
        yield Module(f"{at}.self_attn.q_proj", d, heads * e, o.qkv_bias, heads)
        yield Module(f"{at}.self_attn.k_proj", d, kv * e, o.qkv_bias, kv)
        yield Module(f"{at}.self_attn.v_proj", d, kv * e, o.qkv_bias)
        if config.qk_norm:
            yield Module(f"{at}.self_attn.q_norm", e)
            yield Module(f"{at}.self_attn.k_norm", e)
        yield Module(f"{at}.self_attn.o_proj", heads * e, d, o.out_bias)
        yield Module(f"{at}.post_attention_layernorm", d)
        yield Module(f"{at}.mlp.gate_proj", d, f, o.mlp_bias)
        yield Module(f"{at}.mlp.up_proj", d, f, o.mlp_bias)
        yield Module(f"{at}.mlp.down_proj", f, d, o.mlp_bias)
    yield Module("model.norm", d)
    if not config.tie_word_embeddings:
        yield Module("lm_head", d, config.vocab_size)


def gguf_name(path: str) -> str:
    """llama.cpp's name of a module: model.layers.3.mlp.up_proj -> blk.3.ffn_up."""
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return f"blk.{block[1]}.{GGUF_NAMES[block[2]]}" if block else GGUF_NAMES[path]


def entries(
    config: LlamaConfig,
    quantized: Mapping[str, Setting] | None = None,
    gguf: bool = False,
    paired: bool = False,
) -> list[Entry]:
    """The table. quantized: how a module is quantised already, by our paths. gguf: llama.cpp's names.

    paired: rotary pairs of q and k stand side by side in the source.
    """
    out: list[Entry] = []
    for m in modules(config):
        source = gguf_name(m.path) if gguf else m.path
        if not m.rows:
            out.append(vector(f"{source}.weight", f"{m.path}.weight", m.columns))
            continue
        out += _matrix(m, source, (quantized or {}).get(m.path), config.head_dim if paired else 0)
    if gguf:
        return [*out, unused("rope_freqs.weight", (config.head_dim // 2,), COMPUTED, optional=True)]
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        out.append(unused(name, (config.head_dim // 2,), COMPUTED, optional=True))
    if config.tie_word_embeddings and not quantized:
        shape = (config.vocab_size, config.hidden_size)
        out.append(Entry("lm_head.weight", None, shape, optional=True, same_as="model.embed_tokens.weight"))
    return out


def _matrix(m: Module, source: str, setting: Setting | None, head_dim: int) -> Iterator[Entry]:
    """Its weight, or the parts of a quantised one, and its bias. head_dim: 0 where rows stay in their order."""

    def op(*rest: int) -> Any:
        return rope_rows(m.heads, head_dim, *rest) if m.heads and head_dim else IDENTITY

    shape = (m.rows, m.columns)
    parts: list[tuple[str, Shape, mx.Dtype]] = [("weight", shape, mx.float32)]
    if setting is not None:
        parts = stored_parts(shape, mx.float16, dict(setting))
    for part, size, dtype in parts:
        packed = dtype in (mx.uint32, mx.uint8)
        yield Entry(f"{source}.{part}", f"{m.path}.{part}", size, op(size[1]), packed=packed)
    if m.bias:
        yield Entry(f"{source}.bias", f"{m.path}.bias", (m.rows,), op())


def detect(source: Source) -> bool:
    """By config.json's model_type, or the architecture in a GGUF file's metadata."""
    if source.path.suffix == GGUF:
        try:
            file = source.open()
        except UserError:
            return False
        return isinstance(file, GGUFFile) and file.metadata.get("general.architecture") in KINDS
    return source.json().get("model_type") in KINDS


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for a config that our model file does not know."""
    checkpoint = source.open()
    if isinstance(checkpoint, GGUFFile):
        return _gguf_plan(source, checkpoint)
    config = read_config(source)
    table = source.json().get("quantization")
    quantized = _quantized(config, table, checkpoint.tensors, str(source.folder))
    files = source.tokenizer_files()
    if HUGGINGFACE_FILE in files:  # it knows the added tokens too, and where both lie the other would be read
        files.pop(SENTENCEPIECE_FILE, None)
    rows = tuple(entries(config, quantized))
    card = Card(source.name or source.folder.name, _licence(source), pipeline="text-generation")
    return Plan(FAMILY, config.to_dict(), {"": checkpoint}, rows, files, card,
                quantization=quantization_table(quantized) if quantized else None)  # fmt: skip


def _gguf_plan(source: Source, file: GGUFFile) -> Plan:
    config = read_gguf(file)
    paths = {gguf_name(m.path): m.path for m in modules(config) if m.rows}
    quantized = {
        paths[name]: {"group_size": GROUP, "bits": bits} for name, bits in file.bits.items() if name in paths
    }
    files = source.tokenizer_files() if source.tokenizer else tokenizer_files(file.metadata, str(file.where))
    paired = file.metadata["general.architecture"] == "llama"
    rows = tuple(entries(config, quantized, gguf=True, paired=paired))
    name, licence = (file.metadata.get(f"general.{key}") for key in ("name", "license"))
    card = Card(
        str(name or file.where.stem), str(licence or "unknown"), pipeline="text-generation",
        notes=f"From the GGUF file {file.where.name}.",
    )  # fmt: skip
    return Plan(FAMILY, config.to_dict(), {"": file}, rows, files, card,
                quantization=quantization_table(quantized) if quantized else None)  # fmt: skip


def _quantized(config: LlamaConfig, table: Any, names: Mapping[str, Any], where: str) -> dict[str, Setting]:
    """How each matrix of a folder of mlx-lm is quantised, by its path; {} of any other folder."""
    if table is None:
        return {}
    if not (isinstance(table, dict) and {"group_size", "bits"} <= table.keys()):
        raise UserError(f'{where}: "quantization" in config.json must hold group_size and bits')
    usual = {key: table[key] for key in ("group_size", "bits", "mode") if key in table}
    paths = [m.path for m in modules(config) if m.rows and f"{m.path}.scales" in names]
    return {path: table[path] if isinstance(table.get(path), dict) else usual for path in paths}


def _licence(source: Source) -> str:
    """What the head of README.md says."""
    file: Path = source.folder / "README.md"
    if not file.is_file():
        return "unknown"
    text = file.read_text(encoding="utf-8", errors="replace")[:10_000]
    found = re.search(r"\A---\s.*?^license:\s*[\"']?([\w.-]+)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else "unknown"


CONVERTER = Converter(
    FAMILY,
    "Llama, Qwen2, Qwen3, SmolLM, TinyLlama (folders of Hugging Face or mlx-lm, GGUF files)",
    detect,
    plan,
)
