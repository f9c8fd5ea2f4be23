"""A small foreign family for tests of the converters: two checkpoint files, a tied head, a convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from convert_package import module, noise

table, sources = module("table"), module("sources")
VOCABULARY, WIDTH = 48, 64


class Toy(nn.Module):
    """What is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)]
        self.odd = nn.Linear(24, 8)
        self.patch = nn.Linear(12, WIDTH)
        self.picture = nn.Conv2d(3, 8, 5)


def entries() -> list[Any]:
    return [
        table.Entry("model.embed.weight", "embed_tokens.weight", (VOCABULARY, WIDTH)),
        table.Entry("head.weight", None, (VOCABULARY, WIDTH), optional=True, same_as="model.embed.weight"),
        table.unused("position_ids", (1, 7), "counted when needed", optional=True),
        *table.linear("model.0", "layers.0", 2 * WIDTH, WIDTH),
        *table.linear("model.1", "layers.1", WIDTH, 2 * WIDTH, bias=False),
        *table.linear("odd", "odd", 8, 24),
        table.Entry("x.weight", "patch.weight", (WIDTH, 12), table.reorder_columns(WIDTH, (3, 2, 2), (1, 2, 0))),
        table.vector("x.bias", "patch.bias", WIDTH),
        *(e.under("vae.") for e in table.conv2d("conv", "picture", 8, 3, 5)),
    ]  # fmt: skip


def plan(source: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "family": "toy", "config": {"model_type": "toy", "width": WIDTH},
        "parts": {"": source.open("model.safetensors"), "vae.": source.open("ae.safetensors")},
        "entries": tuple(entries()), "files": {"notes.txt": b"text"}, "model": Toy(),
        "card": table.Card("org/Toy", "apache-2.0", url="https://example.org"),
    }  # fmt: skip
    return table.Plan(**fields | changes)


def tensors(
    dtype: mx.Dtype = mx.float32, optional: bool = True
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Random tensors of the two files."""
    out: dict[str, mx.array] = {}
    for i, entry in enumerate(entries()):
        if optional or not entry.optional:
            out[entry.source] = noise(entry.shape, i, dtype)
    if optional:
        out["head.weight"] = out["model.embed.weight"]
        out["position_ids"] = mx.arange(7, dtype=mx.int64)[None]
    autoencoder = {n.removeprefix("vae."): v for n, v in out.items() if n.startswith("vae.")}
    return {n: v for n, v in out.items() if not n.startswith("vae.")}, autoencoder


def write(folder: Path, dtype: mx.Dtype = mx.float32, optional: bool = True) -> Any:
    """The two files in a new folder, as a Source."""
    folder.mkdir(parents=True)
    for name, part in zip(("model", "ae"), tensors(dtype, optional), strict=True):
        mx.save_safetensors(str(folder / f"{name}.safetensors"), part)
    return sources.Source(folder, "org/Toy")
