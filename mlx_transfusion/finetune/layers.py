"""Linear layers with a trainable low-rank difference beside a frozen matrix, plain or quantised."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.config import AdapterTraining

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
TRAINED = ("lora_a", "lora_b", "m")
"""Names of the arrays of an adapter in its layer."""


@dataclass
class Gate:
    """Where the adapters of an image-only model act in the forward pass at hand; None is everywhere."""

    tokens: mx.array | None = None
    """Which tokens of the packed rows belong to a noisy picture. bool [B, T, 1]"""
    pictures: mx.array | None = None
    """Which pictures are noisy. bool [M, 1, 1]"""
    off: bool = False
    """Whether the model is to be what it was without its adapters."""


class AdaptedLinear(nn.Module):
    """y = x W^T + scale (x A) B, and for DoRA each output times m / |W + scale (A B)^T| of its row."""

    def __init__(
        self,
        linear: nn.Linear | nn.QuantizedLinear,
        spec: AdapterTraining,
        key: mx.array,
        gate: Gate,
        block: bool,
    ) -> None:
        """block: whether it stands in a transformer block and so sees packed tokens, else pictures [M, N, D]."""
        super().__init__()
        self.linear = linear
        self._scale, self._gate, self._block = spec.scale, gate, block
        weight = plain_weight(linear)
        outputs, inputs = weight.shape
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, spec.rank), key=key)
        self.lora_b = mx.zeros((spec.rank, outputs))
        if spec.type == "dora":
            self.m = mx.linalg.norm(weight.astype(mx.float32), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] -> [..., outputs]."""
        plain = self.linear(x)
        if self._gate.off:
            return plain
        difference = self._scale * ((x @ self.lora_a) @ self.lora_b)
        out = plain + difference.astype(plain.dtype)
        if "m" in self:
            out = self._rescaled(out)
        where = self._gate.tokens if self._block else self._gate.pictures
        # A choice, not a product with zero: what the adapter leaves alone keeps its bits.
        return out if where is None else mx.where(where, out, plain)

    def _rescaled(self, out: mx.array) -> mx.array:
        new = plain_weight(self.linear) + self._scale * (self.lora_a @ self.lora_b).T
        # The length counts as a constant in the gradient (arXiv 2402.09353, section 4.3).
        factor = (self.m / mx.stop_gradient(mx.linalg.norm(new, axis=1))).astype(out.dtype)
        if "bias" not in self.linear:
            return out * factor
        return (out - self.linear.bias) * factor + self.linear.bias


def plain_weight(linear: nn.Linear | nn.QuantizedLinear) -> mx.array:
    """The matrix [outputs, inputs] of a linear layer."""
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            linear.group_size,
            linear.bits,
            mode=linear.mode,
        )
    return linear.weight


def targets(model: nn.Module, spec: AdapterTraining) -> list[str]:
    """Names of the linear layers that get an adapter. Raises UserError when there are none."""
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.QuantizedLinear)]
    block_of = {n: int(match.group(1)) for n in names if (match := _BLOCK.search(n))}
    blocks = sorted(set(block_of.values()))
    kept = blocks if spec.layers < 0 else blocks[len(blocks) - min(spec.layers, len(blocks)) :]
    found = [
        n
        for n in sorted(names)
        if any(fnmatchcase(n, pattern) for pattern in spec.targets)
        and (n not in block_of or block_of[n] in kept)
    ]
    if not found:
        raise UserError(
            f"no linear layer matches the targets {', '.join(spec.targets)} in the last {spec.layers} blocks: "
            f"the model has layers such as {', '.join(sorted(names)[:4])}"
        )
    outside = [n for n in found if n.split(".")[0] in ("lm_head", "embed_tokens")]
    if spec.modality == "image" and outside:
        raise UserError(
            f"an image-only adapter cannot have {outside[0]}, which only text passes: leave it out"
        )
    return found


def insert(model: nn.Module, spec: AdapterTraining, seed: int, gate: Gate) -> list[str]:
    """Freeze `model` and put adapters into it in place, not evaluated yet; returns the names of their layers."""
    names = targets(model, spec)
    modules = dict(model.named_modules())
    model.freeze()
    new: list[tuple[str, nn.Module]] = []
    for name in names:
        # Its own key: the first numbers of a layer do not depend on which others have an adapter.
        key = mx.random.key((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
        layer = AdaptedLinear(modules[name], spec, key, gate, name.startswith("layers."))
        layer.linear.freeze()
        new.append((name, layer))
    model.update_modules(tree_unflatten(new))
    return names


def flat_trained(model: nn.Module, names: list[str]) -> dict[str, mx.array]:
    """The arrays of the adapters in `model`, by name."""
    wanted = {f"{name}.{array}" for name in names for array in TRAINED}
    return {name: value for name, value in dict(tree_flatten(model.parameters())).items() if name in wanted}
