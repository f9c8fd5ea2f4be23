"""What a frozen language model says about prompts: read once each, and kept.

Reading the prompts would be more than half of a step whose only gradients are those of 16 image tokens. Each prompt
is read by itself, so that its numbers do not depend on the batch, and a resumed run goes on exactly.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_transfusion.models.layers import KeysValues
from mlx_transfusion.models.llama_painter import LlamaPainter, join_columns, repeat_rows

Read = tuple[list[KeysValues], mx.array]
"""Keys and values of one prompt behind the common beginning, of the layers in use; its last hidden states [S, D]."""


class PromptMemory:
    """The prompts of a model, up to a limit of memory; at the limit nothing is thrown out, as in PixelCache."""

    def __init__(self, model: LlamaPainter, limit_bytes: int) -> None:
        self._model, self._room = model, limit_bytes
        self._kept: dict[bytes, Read] = {}
        self._begun: list[KeysValues] | None = None

    def __len__(self) -> int:
        """Number of prompts kept."""
        return len(self._kept)

    def read(self, ids: np.ndarray, lengths: np.ndarray, back: int) -> tuple[list[KeysValues], mx.array]:
        """Prompts [B, S], padded on the right, with real lengths [B], that all begin with `prompt_before`.

        Returns keys and values of the layers that pictures look at, in their order, padded on the right, and the
        hidden states [B, D] of each prompt's last token but `back`. A row of length 1 is padding: all zeros.
        """
        common = len(self._model.config.prompt_before)
        if self._begun is None:
            self._begun = self._model.read_common()[1] if common else []
        width = self._model.config.hidden_size
        if not len(ids):
            return [], mx.zeros((0, width))
        rows = [self._one(row[common:n]) if n > 1 else None for row, n in zip(ids, lengths, strict=True)]
        columns = max(0, ids.shape[1] - common)
        layers = self._model.config.painter_layers
        joined = []
        for i, at in enumerate(layers):
            rest = self._padded([None if row is None else row[0][i] for row in rows], columns)
            joined.append(join_columns(repeat_rows(self._begun[at], len(rows)), rest) if common else rest)
        hidden = [mx.zeros((width,)) if row is None else row[1][-1 - back] for row in rows]
        return joined, mx.stack(hidden)

    def _one(self, ids: np.ndarray) -> Read:
        key = np.ascontiguousarray(ids, np.int32).tobytes()
        if key in self._kept:
            return self._kept[key]
        assert self._begun is not None
        tokens = mx.array(ids[None].astype(np.int32))
        model = self._model
        if self._begun:
            hidden, added = model.read_rest(tokens, self._begun)
        else:
            hidden, added = model.read_prefix(tokens)
        out: Read = [added[at] for at in model.config.painter_layers], hidden[0, -2:] + 0
        mx.eval(out)
        size = sum(k.nbytes + v.nbytes for k, v in out[0]) + out[1].nbytes
        if size <= self._room:
            self._room -= size
            self._kept[key] = out
        return out

    def _padded(self, parts: list[KeysValues | None], columns: int) -> KeysValues:
        c = self._model.config
        nothing = mx.zeros((1, c.kv_heads, columns, c.head_dim))

        def wide(x: mx.array) -> mx.array:
            return mx.pad(x, [(0, 0), (0, 0), (0, columns - x.shape[2]), (0, 0)])

        keys = [nothing if p is None else wide(p[0]) for p in parts]
        values = [nothing if p is None else wide(p[1]) for p in parts]
        return mx.concatenate(keys), mx.concatenate(values)
