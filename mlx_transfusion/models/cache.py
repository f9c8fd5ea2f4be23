"""Keys and values of what has been read, for a batch of rows that may differ in length."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_transfusion.models.layers import KeysValues, Mask, Slot

GROWTH = 256
"""Columns that are allocated at once for tokens that come one by one."""


class KVCache:
    """Frozen keys and values of B rows.

    Every row occupies the same S columns; shorter rows have columns marked invalid, which attention masks.
    `lengths` counts the valid ones. A copy made by `select` or `snapshot` stays as it was, whatever this one reads.
    """

    def __init__(self, layers: int, batch: int) -> None:
        self._room: list[KeysValues | None] = [None] * layers
        """Keys and values of each layer, [B, K, S or more, E]: the columns behind S are free."""
        self.valid = np.zeros((batch, 0), bool)
        self.positions = np.zeros(batch, int)
        """Position of each row's next token [B]: the number of valid columns, unless a family counts otherwise."""

    @property
    def layers(self) -> list[KeysValues | None]:
        """Keys and values of each layer, [B, K, S, E]; None where nothing has been read."""
        return [None if room is None else _first(room, self.valid.shape[1]) for room in self._room]

    @layers.setter
    def layers(self, layers: Sequence[KeysValues | None]) -> None:
        self._room = list(layers)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens each row has seen. int [B]"""
        return self.valid.sum(1)

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return len(self.valid)

    def offset(self) -> int | mx.array:
        """Position of the next token: one number when all rows agree, else one per row [B]."""
        positions = self.positions
        if self.batch and (positions == positions[0]).all():
            return int(positions[0])
        return mx.array(positions.astype(np.int32))

    def visible(self, new: np.ndarray | None = None) -> np.ndarray:
        """Which columns may be looked at, followed by those of `new` tokens [B, T]. bool [B, S(+T)]"""
        return self.valid if new is None else np.concatenate([self.valid, new], 1)

    def text_mask(self, new: np.ndarray) -> Mask:
        """What text tokens behind the cache see; new: which of them are real, bool [B, T].

        Causal among themselves and open to all that is valid in the cache; the cheap forms where they serve.
        """
        t, s = new.shape[1], self.valid.shape[1]
        if new.all() and self.valid.all():
            return None if t == 1 else "causal"
        causal = np.concatenate([np.ones((t, s), bool), np.tril(np.ones((t, t), bool))], 1)
        mask = causal & self.visible(new)[:, None]
        # A padded query keeps itself: a row that sees nothing is undefined on some backends.
        mask |= np.eye(t, s + t, s, dtype=bool)
        return mx.array(mask[:, None])

    def picture_mask(self, new: np.ndarray) -> Mask:
        """What every token of a picture sees: valid columns, and those of `new`, bool [B, T], that are real."""
        visible = self.visible(new)
        return None if visible.all() else mx.array(visible[:, None, None])

    def append(self, new: list[KeysValues], valid: np.ndarray, advance: np.ndarray | None = None) -> None:
        """Add T columns: one pair [B, K, T, E] per layer and which of them hold a token, bool [B, T].

        advance: how far each row's position moves [B]; None means one for each token.
        """
        for slot, (k, v) in zip(self.slots(), new, strict=False):
            slot.join(k, v)
        self.advance(valid, advance)

    def slots(self) -> list[Slot]:
        """One place a layer, which takes the keys and values of the next tokens; then comes `advance`."""
        return [_Slot(self._room, i, self.valid.shape[1]) for i in range(len(self._room))]

    def advance(self, valid: np.ndarray, advance: np.ndarray | None = None) -> None:
        """Count T columns that every layer has taken; arguments as of `append`."""
        self.valid = np.concatenate([self.valid, valid], 1)
        self.positions = self.positions + (valid.sum(1) if advance is None else advance)

    def select(self, rows: list[int]) -> KVCache:
        """A new cache with the given rows, in that order (a row may repeat)."""
        out = KVCache(len(self.layers), len(rows))
        index = mx.array(rows)
        out._room = [None if p is None else (p[0][index], p[1][index]) for p in self.layers]
        out.valid, out.positions = self.valid[rows], self.positions[rows]
        return out

    def snapshot(self) -> KVCache:
        """An independent copy (cheap: arrays are shared)."""
        out = KVCache(len(self.layers), self.batch)
        out._room, out.valid, out.positions = list(self._room), self.valid, self.positions
        return out

    def without_last(self) -> KVCache:
        """A new cache that has not read each row's last token, so that it can be read again for its logits."""
        last = self.valid.shape[1] - 1 - np.argmax(self.valid[:, ::-1], 1)
        valid = self.valid.copy()
        valid[np.arange(self.batch), last] = False
        used = np.flatnonzero(valid.any(0))
        columns = int(used[-1]) + 1 if len(used) else 0
        out = KVCache(len(self.layers), self.batch)
        out._room = [None if p is None else _first(p, columns) for p in self._room]
        out.valid, out.positions = valid[:, :columns], self.positions - 1
        return out

    def stack(self, other: KVCache) -> KVCache:
        """A new cache: this one's rows, then the other's; the shorter one is padded with invalid columns."""
        columns = max(self.valid.shape[1], other.valid.shape[1])
        a, b = self._widened(columns), other._widened(columns)
        out = KVCache(len(self.layers), a.batch + b.batch)
        for i, (p, q) in enumerate(zip(a.layers, b.layers, strict=True)):
            if p is not None and q is not None:
                out._room[i] = (mx.concatenate([p[0], q[0]]), mx.concatenate([p[1], q[1]]))
        out.valid = np.concatenate([a.valid, b.valid])
        out.positions = np.concatenate([a.positions, b.positions])
        return out

    def _widened(self, columns: int) -> KVCache:
        missing = columns - self.valid.shape[1]
        if not missing:
            return self
        out = KVCache(len(self.layers), self.batch)
        pad = [(0, 0), (0, 0), (0, missing), (0, 0)]
        out._room = [None if p is None else (mx.pad(p[0], pad), mx.pad(p[1], pad)) for p in self.layers]
        out.valid = np.pad(self.valid, [(0, 0), (0, missing)])
        out.positions = self.positions
        return out


class _Slot(Slot):
    """One layer of a cache, before tokens that are read now."""

    def __init__(self, room: list[KeysValues | None], layer: int, start: int) -> None:
        self._room, self._layer, self._start = room, layer, start

    def join(self, k: mx.array, v: mx.array) -> KeysValues:
        """Write keys and values [B, K, T, E] behind those of S tokens; returns all [B, K, S+T, E].

        An array that nobody else holds is written where it stands, any other is copied first.
        """
        end = self._start + k.shape[2]
        room = self._room[self._layer]
        if room is None:
            self._room[self._layer] = k, v
            return k, v
        if room[0].shape[2] < end:
            room = _grown(room, self._start, end)
        at = mx.array([self._start])
        new = mx.slice_update(room[0], k, at, (2,)), mx.slice_update(room[1], v, at, (2,))
        self._room[self._layer] = new
        return _first(new, end)


def _first(room: KeysValues, columns: int) -> KeysValues:
    return room if room[0].shape[2] == columns else (room[0][:, :, :columns], room[1][:, :, :columns])


def _grown(room: KeysValues, used: int, needed: int) -> KeysValues:
    """Copies with free columns behind those in use."""
    free = [(0, 0), (0, 0), (0, needed + GROWTH - used), (0, 0)]
    k, v = _first(room, used)
    return mx.pad(k, free), mx.pad(v, free)
