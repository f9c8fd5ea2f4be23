"""GGUF's number formats: which there are, and their blocks as mlx's quantised matrices or as plain numbers.

A block of Q4_0, Q4_1 and Q8_0 is 32 numbers with one scale d (and one least value m), which is what a group of mlx's
affine quantisation is: x = scale * q + bias with unsigned q. Only the order of the bits differs, so nothing is lost.
Q4_K, Q5_K and Q6_K have scales of scales, which mlx lacks: they become plain float16.
Shapes: N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockType:
    """One format."""

    name: str
    size: int
    """Numbers in a block."""
    nbytes: int
    """Bytes of a block."""
    dtype: str = "F16"
    """Name of the plain type in a safetensors header, of formats that are none of mlx's."""
    bits: int = 0
    """Of mlx's quantised form in groups of 32; 0: read as plain numbers."""
    part: Callable[[np.ndarray, str], np.ndarray] | None = None
    """Blocks uint8 [N, nbytes] and "weight", "scales" or "biases" -> uint32 [N, bits] or float16 [N]."""
    whole: Callable[[np.ndarray], np.ndarray] | None = None
    """Blocks uint8 [N, nbytes] -> float16 [N, size]."""


def _half(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The float16 [N] at a byte of every block."""
    return np.ascontiguousarray(blocks[:, begin : begin + 2]).view("<f2")[:, 0]


def _q4(blocks: np.ndarray, part: str, least: int | None) -> np.ndarray:
    """Q4_1 holds its least value at byte `least`; that of Q4_0 is -8 d."""
    scale = _half(blocks, 0)
    if part == "scales":
        return scale
    if part == "biases":
        return scale * np.float16(-8) if least is None else _half(blocks, least)
    nibbles = blocks[:, 2 if least is None else 4 :]
    # Byte j holds numbers j and j + 16; mlx wants 2j and 2j + 1 there.
    numbers = np.concatenate([nibbles & 15, nibbles >> 4], 1)
    return np.ascontiguousarray(numbers[:, ::2] | numbers[:, 1::2] << 4).view("<u4")


def _q4_0(blocks: np.ndarray, part: str) -> np.ndarray:
    return _q4(blocks, part, None)


def _q4_1(blocks: np.ndarray, part: str) -> np.ndarray:
    return _q4(blocks, part, 2)


def _q8_0(blocks: np.ndarray, part: str) -> np.ndarray:
    scale = _half(blocks, 0)
    if part == "scales":
        return scale
    if part == "biases":
        return scale * np.float16(-128)
    return np.ascontiguousarray(blocks[:, 2:] ^ 128).view("<u4")  # signed -> unsigned


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers: d, least d, 8 pairs of 6-bit scale and least value, and 4 bits a number."""
    return _scaled_twice(blocks, _nibbles(blocks[:, 16:]))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    """As Q4_K, with the fifth bits in between: bit i of byte j is that of number j of part i."""
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _scaled_twice(blocks, _nibbles(blocks[:, 48:]) | fifth << 4)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[N, 128] -> [N, 8, 32]: of every 32 bytes the low halves, then the high ones."""
    packed = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([packed & 15, packed >> 4], 2).reshape(-1, 8, 32)


def _scaled_twice(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    d, least = (_half(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | (low >> 6) << 4], 1)
    lows = np.concatenate([mid & 63, high >> 4 | (mid >> 6) << 4], 1)
    return _halves((d * scales)[..., None] * numbers - (least * lows)[..., None], len(blocks))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers: the low 4 bits, the high 2, 16 signed scales, d."""
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 2, 32)
    high = blocks[:, 128:192].reshape(n, 2, 1, 32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    d = _half(blocks, 208).astype(np.float32)
    lows = np.concatenate([low & 15, low >> 4], 2)
    highs = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    numbers = (lows | highs << 4).astype(np.float32).reshape(n, 16, 16) - 32
    return _halves((d[:, None] * scales)[..., None] * numbers, n)


def _halves(numbers: np.ndarray, blocks: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # a broken file may hold any scale
        return numbers.astype(np.float16).reshape(blocks, -1)


TYPES = {
    0: BlockType("F32", 1, 4, "F32"),
    1: BlockType("F16", 1, 2, "F16"),
    2: BlockType("Q4_0", 32, 18, bits=4, part=_q4_0),
    3: BlockType("Q4_1", 32, 20, bits=4, part=_q4_1),
    8: BlockType("Q8_0", 32, 34, bits=8, part=_q8_0),
    12: BlockType("Q4_K", 256, 144, whole=_q4_k),
    13: BlockType("Q5_K", 256, 176, whole=_q5_k),
    14: BlockType("Q6_K", 256, 210, whole=_q6_k),
    30: BlockType("BF16", 1, 2, "BF16"),
}
"""By the number in a tensor's header."""
