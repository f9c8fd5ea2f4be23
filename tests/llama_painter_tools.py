"""A tiny chat model with a picture side, and data to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from llama_tools import VOCAB, config, random_llama, tokenizer, write_tokenizer
from mlx.utils import tree_map_with_path
from PIL import Image
from tiny_training import top

from mlx_transfusion.model_io import save_model, special_ids
from mlx_transfusion.models.layers import Attention
from mlx_transfusion.models.llama_painter import LlamaPainter
from mlx_transfusion.models.llama_painter_parts import LowRankBlock
from mlx_transfusion.picture_side import PictureOptions, extend
from mlx_transfusion.tokenizer import Tokenizer

SPARE = ["<|spare_0|>", "<|spare_1|>"]
OPTIONS: dict[str, Any] = {"image_size": 8, "patch_size": 4, "image_std": 0.5}
TABLES = """
[data]
caption_first = 1.0
caption_drop = 0.2

[[data.train]]
rows = "pairs.jsonl"
images = "pictures"
weight = 2

[[data.train]]
rows = "words.jsonl"

[optimizer]
learning_rate = 1e-2
warmup = 1
"""
TOML = top(tokenizer="paints", init="paints", sequence_length=128, save_every=3, ema=0.5) + TABLES


def write_llama(folder: Path, **changes: Any) -> Path:
    """A language model's folder whose vocabulary has two special tokens to spare."""
    write_tokenizer(folder)
    made = tokenizer()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPARE])
    made.save(str(folder / "tokenizer.json"))
    shape = config(vocab_size=VOCAB + len(SPARE), num_hidden_layers=4, **changes)
    save_model(folder, random_llama(shape), Tokenizer.load(folder, special_ids(shape)))
    return folder


def write_run(folder: Path, **options: Any) -> Path:
    """A language model, its copy that paints, pairs and words; returns `train.toml`."""
    extend(write_llama(folder / "llama"), folder / "paints", PictureOptions(**(OPTIONS | options)))
    (folder / "pictures").mkdir()
    pairs = []
    for i, (name, rgb) in enumerate(
        {"red": (230, 20, 20), "green": (20, 200, 30), "blue": (10, 30, 220)}.items()
    ):
        pixels = np.full((8, 8, 3), 255, np.uint8)
        pixels[i : i + 5, 1:6] = rgb
        Image.fromarray(pixels).save(folder / "pictures" / f"{name}.png")
        pairs.append({"image": f"{name}.png", "text": f"Draw {name}."})
    for file, rows in (("pairs", pairs), ("words", [{"text": "Why?"}, {"text": "Who is red?"}])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toml = folder / "train.toml"
    toml.write_text(TOML)
    return toml


def roughen(model: LlamaPainter, seed: int = 5) -> LlamaPainter:
    """Every weight of the picture side matters: nothing is zero, nothing is a copy of the text's any more."""
    mx.random.seed(seed)
    side = tree_map_with_path(
        lambda path, w: w + (0.2 if "wish" not in path else 0.0) * mx.random.normal(w.shape),
        model.painter.parameters(),
    )
    model.painter.update(side)
    return model


def joint_velocity(model: LlamaPainter, ids: list[int], x: mx.array, angle: mx.array) -> mx.array:
    """The definition: one sequence of text [S] and one picture [1, N, P], without a cache, layer by layer.

    Each token passes the matrices and norms of its own kind; attention is over all that may be seen.
    """
    side, text = model.painter, model.model
    embedded = side.angle_embedding(angle)
    picture = side.patch_encoder(x, embedded)[0]
    words = text.embed_tokens(mx.array([ids]))
    s, n = len(ids), x.shape[1]
    mask = mx.array(np.tril(np.ones((s + n, s + n), bool)))
    mask[s:, s:] = True
    stand = dict(zip(model.config.painter_layers, side.layers, strict=True))
    for i, layer in enumerate(text.layers):
        own = stand.get(i)
        if own is None:
            words, _ = layer(words, "causal")
            continue
        other = own.beside(layer) if isinstance(own, LowRankBlock) else own
        halves = [(layer, words, 0), (other, picture, s)]
        q, k, v = (
            mx.concatenate(parts, 2) for parts in zip(*(_heads(*half) for half in halves), strict=True)
        )
        groups = q.shape[1] // k.shape[1]
        scores = q @ mx.repeat(k, groups, 1).swapaxes(2, 3) * model.config.head_dim**-0.5
        seen = mx.softmax(mx.where(mask, scores, -mx.inf), -1) @ mx.repeat(v, groups, 1)
        seen = seen.transpose(0, 2, 1, 3).reshape(1, s + n, -1)
        words = words + layer.self_attn.o_proj(seen[:, :s])
        picture = picture + other.self_attn.o_proj(seen[:, s:])
        words = words + layer.mlp(layer.post_attention_layernorm(words))
        picture = picture + other.mlp(other.post_attention_layernorm(picture))
    return side.patch_decoder(side.norm(picture), x, embedded)


def _heads(block: Any, x: mx.array, at: int) -> tuple[mx.array, mx.array, mx.array]:
    """Rotated queries and keys, and values, of tokens from position `at` on."""
    a: Attention = block.self_attn
    x = block.input_layernorm(x)

    def split(y: mx.array, heads: int) -> mx.array:
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = split(a.q_proj(x), a._heads), split(a.k_proj(x), a._kv_heads), split(a.v_proj(x), a._kv_heads)
    return a._rotate(q, at), a._rotate(k, at), v
