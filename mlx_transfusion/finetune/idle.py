"""Modules of a model that are out of memory while they are of no use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_transfusion.finetune.families import within
from mlx_transfusion.model_io import flat_parameters


class Idle:
    """Some modules of a model, which are read from its folder again when they are needed."""

    def __init__(self, model: nn.Module, modules: Collection[str], read: Callable[[], nn.Module]) -> None:
        """Take them out. read: the model as it was, none of its weights in memory."""
        self._model, self._modules, self._read = model, modules, read
        self._take_out()

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside, the modules are there again; each weight comes into memory when it is used."""
        weights = flat_parameters(self._read())
        self._put({name: value for name, value in weights.items() if within(name, self._modules)})
        del weights
        try:
            yield
        finally:
            self._take_out()

    def _take_out(self) -> None:
        mine = {n: v for n, v in flat_parameters(self._model).items() if within(n, self._modules)}
        self._put({name: _nothing(value) for name, value in mine.items()})
        del mine
        mx.clear_cache()

    def _put(self, weights: dict[str, mx.array]) -> None:
        if weights:
            self._model.update(tree_unflatten(list(weights.items())))


def _nothing(value: mx.array) -> mx.array:
    """What stands in the place of a weight: its shape, without memory; NaN, so that no use of it goes unseen."""
    number = float("nan") if mx.issubdtype(value.dtype, mx.floating) else 0
    return mx.broadcast_to(mx.array(number, value.dtype), value.shape)
