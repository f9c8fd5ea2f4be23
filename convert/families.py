"""Which families of checkpoints can be converted, and which one a SOURCE is."""

from __future__ import annotations

from importlib import import_module

from mlx_transfusion.errors import UserError

from .sources import Source
from .table import Converter

FAMILIES: tuple[str, ...] = (
    "bagel",
    "janusflow",
    "monoformer",
    "show_o2",
    "llama",
    "transfusion_pytorch",
    "clip",
    "inception",
    "lpips",
    "autoencoder",
    "state_dict",
)
"""Modules of this package that end with a `CONVERTER`, asked in this order: the most special first."""

STRANGE = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError
)  # fmt: skip
"""What a family's reading of a foreign config runs into when values are missing or of another kind."""


def converter(name: str) -> Converter:
    """The family of that name. Raises UserError for an unknown one."""
    found: dict[str, Converter] = {c.name: c for c in converters()}
    if name not in found:
        raise UserError(f'--family: "{name}" is unknown, expected one of {", ".join(found)}')
    return found[name]


def converters() -> list[Converter]:
    """All of them."""
    return [import_module(f".{module}", __package__).CONVERTER for module in FAMILIES]


def find(source: Source) -> Converter:
    """The family of a source, by its config.json or the names of its tensors.

    Raises UserError with what can be converted when it is none of them.
    """
    given = source.json()
    for family in converters():
        if _is(family, source):
            return family
    source.open()  # a file that cannot be read is the better message
    said = given.get("model_type") or given.get("_class_name") or given.get("architectures")
    known = "; ".join(f"{c.name}: {c.title}" for c in converters())
    raise UserError(
        f"{source.path}: no known family of checkpoints{f' (config.json says {said})' if said else ''}: "
        f"name one with --family. Known are {known}"
    )


def _is(family: Converter, source: Source) -> bool:
    try:
        return family.detect(source)
    except STRANGE:  # a config of another kind, or a damaged one
        return False
