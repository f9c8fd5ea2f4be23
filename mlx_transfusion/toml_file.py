"""Configs in TOML files, with keys set over them from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError


def read_toml(path: Path, what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML, with `overrides` ("key.path=value") over them; what: "training config", for messages.

    Raises UserError for a missing or unreadable file, one that is no TOML, and what is no override.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    for item in overrides:
        _override(data, item)
    return data


def _override(data: dict[str, Any], item: str) -> None:
    """Set one key of a TOML's data in place by "key.path=value"; a number names a table of a list, from 0.

    Raises UserError for what is no such text.
    """
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f'--set "{item}": expected key.path=value, e.g. --set optimizer.learning_rate=1e-3')
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    inside: Any = data
    for parent in parents:
        if isinstance(inside, list):
            inside = inside[int(parent)] if parent.isdecimal() and int(parent) < len(inside) else None
        else:
            inside = inside.setdefault(parent, {})
        if not isinstance(inside, dict | list):
            raise UserError(f'--set "{item}": {parent} is not a table')
    if isinstance(inside, list):
        raise UserError(f'--set "{item}": {parents[-1]} is a list: name one of its tables, from 0')
    inside[last] = value
