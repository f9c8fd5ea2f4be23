"""What a conversion gives, told before it is done: tensors, sizes, and the memory that generation will take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.model_io import build
from mlx_transfusion.models.family import FamilyConfig

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
    """The cache of one picture and TEXT_TOKENS of text; twice, for guidance, where pictures are painted.

    None of a part that is no model of its own.
    """
    if done.config is None:
        return None
    pictures = done.config.layout.picture_tokens
    number = next((t.dtype.size for t in done.stored if mx.issubdtype(t.dtype, mx.floating)), 2)
    rows = 2 if pictures else 1
    return rows * (pictures + TEXT_TOKENS) * numbers_a_token(done.config) * number


def numbers_a_token(config: FamilyConfig) -> int:
    """How many keys, values and the like one token leaves in the cache of a model of this config.

    Taken from the shapes of a pass that is never computed, so no weight is allocated.
    """
    _, cache = build(config).prefill(np.array([[0]]), np.array([1]))
    return sum(part.size for layer in cache.layers if layer is not None for part in layer)


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
