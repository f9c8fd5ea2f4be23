"""Every tensor accounted for, from headers alone: what a checkpoint lacks, what a model would lack, what is stored.

Nothing is read or written before this has passed; a dry run ends here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import build, family, flat_parameters
from mlx_transfusion.models.family import FamilyConfig
from mlx_transfusion.quantization import parameter_count, quantize_like

from .quantize import Options, settings_of, stored_parts
from .safetensors_file import DTYPES, FLOATS, TensorInfo
from .sources import Checkpoint
from .table import Entry, Plan, Shape

PACKED = ("U32", "U8")
"""Types of the numbers and scales of matrices that are quantised already."""
LISTED = 60
"""More faults than these are listed by the pattern of their names."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the new folder."""

    name: str
    shape: Shape
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Size of its numbers in bytes."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Job:
    """One foreign tensor and what becomes of it."""

    entry: Entry
    checkpoint: Checkpoint
    name: str
    """Its name in that checkpoint."""
    info: TensorInfo
    stored: tuple[Stored, ...]
    """Empty for a tensor that is not used."""
    dtype: mx.Dtype | None = None
    """What its numbers become before they are quantised or stored."""
    setting: dict[str, Any] | None = None
    """How it is quantised."""


@dataclass(frozen=True)
class Account:
    """A plan that fits its checkpoints and its model."""

    plan: Plan
    config: FamilyConfig | None
    """None of a part that is no model of its own."""
    jobs: tuple[Job, ...]
    """In the order of the files that they are read from."""
    quantization: dict[str, Any] | None
    """config.json's table."""
    parameters: int
    """Numbers of the model before quantisation."""

    @property
    def stored(self) -> list[Stored]:
        """All tensors of the new folder, in the order in which they are written."""
        return [stored for job in self.jobs for stored in job.stored]

    @property
    def nbytes(self) -> int:
        """Size of the new weights in bytes."""
        return sum(stored.nbytes for stored in self.stored)


def account(plan: Plan, options: Options) -> Account:
    """Compare a plan with the headers of its checkpoints and with the model that its config describes.

    Raises UserError that lists every tensor which is missing, unexpected, misshapen or of a wrong dtype, and every
    parameter of the model that would stay empty.
    """
    where = ", ".join(str(part.where) for part in plan.parts.values())
    config, model = None, plan.model
    if model is None:
        kind = family(plan.config.get("model_type"), plan.family)
        config = kind.config.from_dict(dict(plan.config), plan.family)
        model = build(config)
    if plan.quantization is not None:
        targets = {e.target for e in plan.entries if e.target}
        quantize_like(model, targets, dict(plan.quantization), plan.family)
    found = _found(plan)
    faults = [*_source_faults(plan, found), *_target_faults(plan, model)]
    if faults:
        raise UserError(f"{where}: does not fit the {plan.family} family: {'; '.join(shortened(faults))}")
    settings = settings_of(model, plan, options)
    jobs = [_job(e, found[e.source], settings, options) for e in plan.entries if e.source in found]
    jobs.sort(key=lambda job: str(job.info.file))  # keeps the table's order within a file
    table = options.table(settings) if settings else plan.quantization
    return Account(plan, config, tuple(jobs), dict(table) if table else None, parameter_count(model))


def shortened(faults: list[str]) -> list[str]:
    """All faults, those of many layers as one where there are more than LISTED."""
    if len(faults) <= LISTED:
        return faults
    alike = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", fault) for fault in faults)
    return [fault if count == 1 else f"{fault} ({count} of them)" for fault, count in alike.items()]


Found = dict[str, tuple[Checkpoint, str, TensorInfo]]


def _found(plan: Plan) -> Found:
    """All tensors of all parts by the names that entries use."""
    out: Found = {}
    for prefix, part in plan.parts.items():
        for name, info in part.tensors.items():
            if prefix + name in out:
                raise UserError(f"{part.where}: {name} stands in {out[prefix + name][0].where} too")
            out[prefix + name] = part, name, info
    return out


def _source_faults(plan: Plan, found: Found) -> Iterator[str]:
    wanted = {e.source: e for e in plan.entries}
    for name in sorted(e.source for e in wanted.values() if not e.optional and e.source not in found):
        yield f"missing {name}"
    for name in sorted(found.keys() - wanted.keys()):
        yield f"unexpected {name}"
    for name in sorted(found.keys() & wanted.keys()):
        entry, info = wanted[name], found[name][2]
        if info.shape != tuple(entry.shape):
            yield f"{name} has shape {list(info.shape)}, expected {list(entry.shape)}"
        allowed = PACKED if entry.packed else FLOATS if entry.target is not None else tuple(DTYPES)
        if info.dtype not in allowed:
            expected = "packed integers" if entry.packed else "a floating-point one"
            yield f"{name} has dtype {info.dtype}, expected {expected}"


def _target_faults(plan: Plan, model: nn.Module) -> Iterator[str]:
    """What is wrong with the table itself, or with a config that does not belong to the model."""
    parameters = {name: value.shape for name, value in flat_parameters(model).items()}
    shapes = {e.target: e.target_shape for e in plan.entries if e.target is not None}
    for name in sorted(parameters.keys() - shapes.keys()):
        yield f"nothing gives the model's {name}"
    for name in sorted(shapes.keys() - parameters.keys()):
        yield f"the model has no {name}"
    for name in sorted(shapes.keys() & parameters.keys()):
        if tuple(parameters[name]) != shapes[name]:
            yield f"{name} would have shape {list(shapes[name])}, the model has {list(parameters[name])}"


def _job(
    entry: Entry,
    found: tuple[Checkpoint, str, TensorInfo],
    settings: dict[str, dict[str, Any]],
    options: Options,
) -> Job:
    checkpoint, name, info = found
    if entry.target is None:
        return Job(entry, checkpoint, name, info, ())
    dtype = DTYPES[info.dtype][1]
    assert dtype is not None  # _source_faults lets no other pass
    if not entry.packed and options.dtype is not None:
        dtype = options.dtype
    setting = settings.get(entry.target.removesuffix(".weight")) if entry.target.endswith(".weight") else None
    if setting is None:
        stored: tuple[Stored, ...] = (Stored(entry.target, entry.target_shape, dtype),)
    else:
        parts = stored_parts(entry.target_shape, dtype, setting)
        path = entry.target.removesuffix("weight")
        stored = tuple(Stored(path + part, shape, kind) for part, shape, kind in parts)
    return Job(entry, checkpoint, name, info, stored, dtype, setting)
