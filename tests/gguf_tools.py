"""A small GGUF writer for tests: header, metadata, and blocks made by the formats' definitions."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K = 0, 1, 2, 3, 8, 12, 13, 14
Tensor = tuple[int, tuple[int, ...], bytes]
"""GGUF type, shape in numpy's order, bytes."""


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_text(v) for v in value)
    kind, form = (6, "f") if isinstance(value[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{form}", *value)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], alignment: int = 32) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += _text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % alignment)
    return out + b"\0" * (-len(out) % alignment) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def plain(x: np.ndarray) -> Tensor:
    x = x.astype(np.float32)
    return F32, x.shape, x.tobytes()


def quantised(x: np.ndarray, kind: int) -> tuple[Tensor, np.ndarray]:
    """A matrix in blocks of 32, and what it stands for afterwards (float32)."""
    groups = x.astype(np.float32).reshape(-1, 32)
    low, high = groups.min(1), groups.max(1)
    if kind == Q4_1:
        d, m = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
        q = np.clip(np.rint((groups - m[:, None]) / d[:, None]), 0, 15).astype(np.uint8)
        blocks = [
            s.tobytes() + t.tobytes() + (r[:16] | r[16:] << 4).tobytes()
            for s, t, r in zip(d, m, q, strict=True)
        ]
        means = d.astype(np.float32)[:, None] * q + m.astype(np.float32)[:, None]
    elif kind == Q4_0:
        d = (np.abs(groups).max(1) / 7).astype(np.float16)
        q = np.clip(np.rint(groups / d[:, None]) + 8, 0, 15).astype(np.uint8)
        blocks = [s.tobytes() + (r[:16] | r[16:] << 4).tobytes() for s, r in zip(d, q, strict=True)]
        means = d.astype(np.float32)[:, None] * (q.astype(np.float32) - 8)
    else:
        d = (np.abs(groups).max(1) / 127).astype(np.float16)
        signed = np.clip(np.rint(groups / d[:, None]), -127, 127).astype(np.int8)
        blocks = [s.tobytes() + r.tobytes() for s, r in zip(d, signed, strict=True)]
        means = d.astype(np.float32)[:, None] * signed
    return (kind, x.shape, b"".join(blocks)), means.reshape(x.shape)
