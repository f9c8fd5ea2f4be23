"""What a family of checkpoints has to say about itself: a table of tensors, and the rest of a model folder.

A family is one module `convert/NAME.py` that ends with a `Converter` and stands in families.py. It never reads or
writes a weight: it returns a `Plan`, and stream.py checks every tensor against it, converts one tensor at a time,
quantises, and writes the folder. The same table read backwards (`restore`) gives the foreign tensors back, bit for
bit, because an operation is nothing but a view, a permutation of axes and a view.

    from .table import CONV2D, HIGH, LOW, WHOLE, Card, Converter, Entry, Plan, Precision, conv2d, linear
    from .sources import Source

    def entries(config: ToyConfig) -> list[Entry]:
        d, v = config.hidden_size, config.vocab_size
        table = [
            Entry("model.embed_tokens.weight", "embed_tokens.weight", (v, d)),
            Entry("lm_head.weight", None, (v, d), optional=True, same_as="model.embed_tokens.weight"),
            Entry("model.rotary.inv_freq", None, (d // 2,), optional=True, reason="computed from the config"),
        ]
        table += conv2d("patch.proj", "patch_in", d, 3, 2)              # weight OIHW -> OHWI, and bias
        for i in range(config.num_hidden_layers):
            table += linear(f"model.layers.{i}.mlp.up", f"layers.{i}.mlp.up_proj", 4 * d, d, bias=False)
        return table + [entry.under("vae.", "vae.") for entry in vae_entries(config.vae)]

    def precision(path: str) -> Precision:                              # of the module with that path in OUR model
        return HIGH if path == "embed_tokens" else LOW if path.startswith("layers.") else WHOLE

    def plan(source: Source) -> Plan:
        config = ToyConfig(**...)                                       # from source.json("config.json")
        return Plan("toy", config.to_dict(), {"": source.open(), "vae.": source.open("ae.safetensors")},
                    tuple(entries(config)), source.tokenizer_files(), Card("org/Toy-1B", "apache-2.0"), precision)

    def detect(source: Source) -> bool:
        return source.json("config.json").get("model_type") == "toy" # or: "patch.proj.weight" in source.names()

    CONVERTER = Converter("toy", "Toy-1B (org/Toy-1B)", detect, plan)

The names of the second checkpoint of `parts` begin with its key ("vae."), in `Entry.source` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from .sources import Checkpoint, Source

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """From the foreign layout to ours: view as `split`, permute `axes`, view as `merge`. None leaves a part out.

    No arithmetic: `back(apply(x))` has the bits of x.
    """

    split: Shape | None = None
    axes: Shape | None = None
    merge: Shape | None = None

    def shape(self, shape: Shape) -> Shape:
        """Our shape of a foreign tensor of `shape`. Raises ValueError where the operation does not fit it."""
        seen = self.split or shape
        if self.axes is not None:
            if sorted(self.axes) != list(range(len(seen))):
                raise ValueError(f"axes {self.axes} do not fit shape {list(seen)}")
            moved = tuple(seen[i] for i in self.axes)
        else:
            moved = seen
        out = self.merge or moved
        if not prod(shape) == prod(seen) == prod(out):
            raise ValueError(f"shape {list(shape)} cannot be viewed as {list(seen)} and {list(out)}")
        return out

    def apply(self, x: mx.array) -> mx.array:
        """A foreign tensor in our layout."""
        out = self.shape(x.shape)
        x = x if self.split is None else x.reshape(self.split)
        x = x if self.axes is None else x.transpose(self.axes)
        return x.reshape(out)

    def back(self, x: mx.array, shape: Shape) -> mx.array:
        """A tensor of ours in the foreign layout, whose shape is `shape`."""
        seen = self.split or shape
        if self.axes is not None:
            x = x.reshape([seen[i] for i in self.axes])
            x = x.transpose([self.axes.index(i) for i in range(len(self.axes))])
        return x.reshape(shape)


IDENTITY = Op()
TRANSPOSE = Op(axes=(1, 0))
"""[in, out] -> [out, in]."""
CONV1D = Op(axes=(0, 2, 1))
"""PyTorch [out, in, width] -> MLX [out, width, in]; so the next two."""
CONV2D = Op(axes=(0, 2, 3, 1))
CONV3D = Op(axes=(0, 2, 3, 4, 1))
CONV_TRANSPOSE2D = Op(axes=(1, 2, 3, 0))
"""PyTorch [in, out, height, width] -> MLX [out, height, width, in]."""


def reshape(*shape: int) -> Op:
    """The same numbers in the same order under another shape, as a 1x1 convolution that becomes a matrix."""
    return Op(merge=shape)


def patch_matrix(out: int, channels: int, size: int) -> Op:
    """A convolution [out, channels, size, size] whose stride is its size -> the matrix [out, size*size*channels].

    It takes patches flattened as (row, column, channel).
    """
    return Op(axes=(0, 2, 3, 1), merge=(out, size * size * channels))


def reorder_columns(out: int, split: Shape, axes: Shape) -> Op:
    """A matrix [out, prod(split)] with another order of its columns: (c, p, q) -> (p, q, c) is axes (1, 2, 0)."""
    return Op((out, *split), (0, *(a + 1 for a in axes)), (out, prod(split)))


def reorder_rows(split: Shape, axes: Shape, *rest: int) -> Op:
    """As `reorder_columns` for the rows of a matrix [prod(split), *rest], or the numbers of a bias."""
    n = len(split)
    return Op((*split, *rest), (*axes, *range(n, n + len(rest))), (prod(split), *rest))


def rope_rows(heads: int, head_dim: int, *rest: int) -> Op:
    """Rows of a query or key matrix [heads*head_dim, *rest]: rotary pairs side by side (GGUF) -> two halves (HF)."""
    return reorder_rows((heads, head_dim // 2, 2), (0, 2, 1), *rest)


@dataclass(frozen=True)
class Entry:
    """One tensor of the foreign checkpoint and its place in our model."""

    source: str
    target: str | None
    """Our parameter's name; None for a tensor that we do not use, and then `reason` or `same_as` says why."""
    shape: Shape
    """The foreign shape."""
    op: Op = IDENTITY
    optional: bool = False
    """The checkpoint may lack it (only without a target)."""
    reason: str = ""
    same_as: str = ""
    """Source name of a tensor with the same bits (tied weights); checked, and restored by converting back."""
    packed: bool = False
    """uint32 numbers of an already quantised matrix; every other tensor with a target is floating-point."""

    def __post_init__(self) -> None:
        if self.target is None and not (self.reason or self.same_as):
            raise ValueError(f"{self.source}: an unused tensor needs a reason")
        if self.target is not None and self.optional:
            raise ValueError(f"{self.source}: a tensor with a target cannot be optional")

    @property
    def target_shape(self) -> Shape:
        """Our shape."""
        return self.op.shape(self.shape)

    def under(self, source: str = "", target: str = "") -> Entry:
        """The same entry of a part of a larger model: prefixes in front of both names."""
        return replace(
            self,
            source=source + self.source,
            target=None if self.target is None else target + self.target,
            same_as=source + self.same_as if self.same_as else "",
        )


def linear(source: str, target: str, out: int, width: int, bias: bool = True) -> list[Entry]:
    """`.weight` [out, width] and `.bias` [out] of a linear layer."""
    weight = Entry(f"{source}.weight", f"{target}.weight", (out, width))
    return [weight, *([vector(f"{source}.bias", f"{target}.bias", out)] if bias else [])]


def conv2d(
    source: str, target: str, out: int, channels: int, size: int, bias: bool = True, op: Op = CONV2D
) -> list[Entry]:
    """`.weight` [out, channels, size, size] (channels of one group) and `.bias` [out] of a convolution."""
    weight = Entry(f"{source}.weight", f"{target}.weight", (out, channels, size, size), op)
    return [weight, *([vector(f"{source}.bias", f"{target}.bias", out)] if bias else [])]


def norm(source: str, target: str, width: int, bias: bool = False) -> list[Entry]:
    """`.weight` and perhaps `.bias` [width] of a normalisation."""
    return [vector(f"{source}.{n}", f"{target}.{n}", width) for n in ("weight", "bias")[: 1 + bias]]


def vector(source: str, target: str, width: int) -> Entry:
    """One vector [width]."""
    return Entry(source, target, (width,))


def unused(source: str, shape: Shape, reason: str, optional: bool = False) -> Entry:
    """A tensor that our model does without, and why."""
    return Entry(source, None, shape, optional=optional, reason=reason)


class Precision(Enum):
    """How many bits a matrix gets when the user asks for a number of them."""

    LOW = "low"
    """The number that the user asked for."""
    HIGH = "high"
    """More: 8 for 6, 6 for 4 and fewer (embeddings, heads)."""
    WHOLE = "whole"
    """Not quantised (time, patches, autoencoder, norms)."""


LOW, HIGH, WHOLE = Precision.LOW, Precision.HIGH, Precision.WHOLE


def usual_precision(path: str) -> Precision:
    """Of most families: blocks of a decoder low, embedding and head high, everything else whole."""
    parts = path.split(".")
    if any(p in ("embed_tokens", "lm_head") for p in parts):
        return HIGH
    return LOW if "layers" in parts or "blocks" in parts else WHOLE


@dataclass(frozen=True)
class Card:
    """What the model card (README.md) says about where a model comes from."""

    base_model: str
    """Hub id of the original, or a name for people."""
    licence: str
    """SPDX name in lower case as the hub spells it ("apache-2.0", "mit"), or "other", or "unknown"."""
    licence_note: str = ""
    """One sentence, for "other"."""
    url: str = ""
    pipeline: str = "text-to-image"
    """The hub's pipeline_tag; "text-generation" for a language model."""
    notes: str = ""


@dataclass(frozen=True)
class Plan:
    """A whole conversion, before a weight is read."""

    family: str
    config: Mapping[str, Any]
    """config.json of the new folder: `model_type` and the fields of that family's config."""
    parts: Mapping[str, Checkpoint]
    """Prefix of `Entry.source` -> opened checkpoint; the main one has the prefix ""."""
    entries: tuple[Entry, ...]
    files: Mapping[str, bytes | Path]
    """Other files of the new folder by name: tokenizer.json, tokenizer.model, ..."""
    card: Card
    precision: Callable[[str], Precision] = usual_precision
    quantization: Mapping[str, Any] | None = None
    """config.json's table "quantization" where the checkpoint's matrices are quantised already (packed entries)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further tables of config.json, of model_files.EXTRA_KEYS."""
    model: nn.Module | None = None
    """What is filled, where `model_type` is none of model_io's families (a part, as an autoencoder)."""


@dataclass(frozen=True)
class Converter:
    """One family of checkpoints: `convert/NAME.py` ends with one, and families.py lists the name."""

    name: str
    title: str
    """For people, in the list of what can be converted."""
    detect: Callable[[Source], bool]
    """Whether this is such a checkpoint; must not raise for any other."""
    plan: Callable[[Source], Plan]
    """Raises UserError for one that it cannot convert."""


def forward(entries: Iterable[Entry], tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Foreign tensors -> ours by name, all at once (tests; stream.py does it one by one)."""
    return {e.target: e.op.apply(tensors[e.source]) for e in entries if e.target is not None}


def restore(entries: Sequence[Entry], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Ours -> foreign tensors by name: the table read backwards. Unused ones are gone, tied ones come back."""
    out: dict[str, mx.array] = {}
    for e in entries:
        if e.target is not None and e.source not in out:
            out[e.source] = e.op.back(weights[e.target], e.shape)
    return out | {e.source: out[e.same_as] for e in entries if e.same_as}
