"""Tiny Llama-family models, their folders, and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_unflatten

from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.llama import Llama, LlamaConfig

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = len(SPECIALS) + 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": (2,),
    "add_bos_token": False, "tie_word_embeddings": True,
}  # fmt: skip


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | changes))


def random_llama(config: LlamaConfig, seed: int = 0, scale: float = 0.3) -> Llama:
    """A model whose every weight matters, biases and norms too."""
    model = Llama(config)
    keys = mx.random.split(mx.random.key(seed), 1000)
    weights = [
        (n, scale * mx.random.normal(v.shape, key=keys[i]) + (1.0 if "norm" in n else 0.0))
        for i, (n, v) in enumerate(sorted(flat_parameters(model).items()))
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def pieces() -> list[str]:
    return SPECIALS + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, behind the specials."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces())}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(s, special=True) for s in SPECIALS])
    return made


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[1], "eos_token": {"content": SPECIALS[2]}, "add_bos_token": False}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def hf_folder(folder: Path, config: LlamaConfig, model: Llama, kind: str = "llama", **changes: Any) -> Path:
    """The model as Hugging Face stores it."""
    write_tokenizer(folder)
    data = config.to_dict() | {"model_type": kind, "torch_dtype": "float32", "eos_token_id": 2} | changes
    for own in ("qkv_bias", "qk_norm", "add_bos_token", "rope_traditional"):
        data.pop(own)
    (folder / "config.json").write_text(json.dumps(data))
    mx.save_safetensors(str(folder / "model.safetensors"), flat_parameters(model))
    return folder
