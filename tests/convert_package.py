"""The converters' modules, from an installed package or from the source tree."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

try:
    NAME = import_module("mlx_transfusion.convert").__name__
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    NAME = "convert"


def module(name: str) -> ModuleType:
    return import_module(f"{NAME}.{name}")


def bits(array: mx.array) -> tuple[Any, ...]:
    """Everything that makes an array, for comparison bit by bit."""
    return (
        array.dtype,
        tuple(array.shape),
        np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes(),
    )


def assert_same(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert bits(a[name]) == bits(b[name]), name


def noise(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype)
