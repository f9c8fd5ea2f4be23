"""What a conversion gives, told before it is done: tensors, sizes, and the memory that generation will take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from mlx_transfusion.generation_memory import cache_bytes

from .account import Account
from .card import bits_a_weight


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
    if done.config is not None:  # a part that is no model of its own generates nothing
        number = next((t.dtype.size for t in done.stored if mx.issubdtype(t.dtype, mx.floating)), 2)
        out["memory for generation"] = done.nbytes + cache_bytes(done.config, number)
    return out


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
