"""What a conversion gives, told before it is done: tensors, sizes, and the memory that generation will take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from .account import Account
from .card import bits_a_weight

TEXT_TOKENS = 512
"""Tokens of text beside a picture, or of a chat, that memory is predicted for."""


def facts(done: Account) -> dict[str, Any]:
    """Plain data about a conversion, from headers alone; sizes in bytes."""
    used = sum(bool(job.stored) for job in done.jobs)
    reasons = Counter(
        job.entry.reason or f"equal to {job.entry.same_as}" for job in done.jobs if not job.stored
    )
    out: dict[str, Any] = {
        "family": done.plan.family,
        "model_type": done.plan.config.get("model_type"),
        "tensors": {"in the checkpoint": len(done.jobs), "used": used, "unused": dict(reasons)},
        "parameters": done.parameters,
        "weights": done.nbytes,
        "bits a weight": round(bits_a_weight(done), 3),
    }
    cache = cache_bytes(done)
    if cache is not None:
        out["memory for generation"] = done.nbytes + cache
    return out


def cache_bytes(done: Account) -> int | None:
    """Keys and values of two rows (with and without the prompt) of one picture and TEXT_TOKENS of text.

    None where the config does not tell the sizes of the decoder.
    """
    decoder = decoder_of(done.config)
    if decoder is None or done.config is None:
        return None
    heads = getattr(decoder, "kv_heads", None) or getattr(decoder, "num_key_value_heads", None)
    heads = heads or decoder.num_attention_heads
    width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    pictures = done.config.layout.picture_tokens
    rows = 2 if pictures else 1
    number = next((t.dtype.size for t in done.stored if mx.issubdtype(t.dtype, mx.floating)), 2)
    return rows * (pictures + TEXT_TOKENS) * 2 * decoder.num_hidden_layers * heads * width * number


def decoder_of(config: Any) -> Any:
    """The part of a config that describes the language model: itself, or the first of its tables that has layers."""
    wanted = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    parts = [config, *vars(config).values()] if hasattr(config, "__dict__") else [config]
    return next((part for part in parts if all(hasattr(part, name) for name in wanted)), None)


def lines(data: dict[str, Any]) -> list[str]:
    """The same for people."""
    tensors = data["tensors"]
    unused = sum(tensors["unused"].values())
    out = [
        f"{data['family']}: {tensors['used']} of {tensors['in the checkpoint']} tensors used"
        + (f", {unused} left out on purpose" if unused else "")
    ]
    out += [f"  {count} left out: {reason}" for reason, count in tensors["unused"].items()]
    out.append(
        f"{data['parameters'] / 1e6:,.1f} million parameters, {size(data['weights'])} of weights, "
        f"{data['bits a weight']:.2f} bits a weight"
    )
    if "memory for generation" in data:
        out.append(f"about {size(data['memory for generation'])} of memory for generation")
    return out


def size(nbytes: float) -> str:
    """Bytes for people, decimal as the hub and disks count."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
