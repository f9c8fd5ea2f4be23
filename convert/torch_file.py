"""One torch checkpoint file: read with weights_only, which runs no code, and mapped: numbers are read when asked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.errors import UserError

from .safetensors_file import DTYPES, TensorInfo, some

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
NAMES = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
}  # fmt: skip


class TorchFile:
    """A plain state dict in a torch file. Raises UserError for anything else, and where torch is not installed."""

    def __init__(self, file: Path) -> None:
        self.where = file
        self._state = _load(file)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(value.shape), _dtype(value, f"{file}: {name}"), file)
            for name, value in self._state.items()
        }

    def read(self, name: str) -> mx.array:
        """One tensor, with the same bits. Raises UserError for a dtype that we have no numbers for."""
        tensor, info = self._state[name], self.tensors[name]
        dtype = DTYPES[info.dtype][1]
        if dtype is None:
            raise UserError(
                f"{self.where}: {name}: has dtype {tensor.dtype}: save it as float32, float16 or bfloat16"
            )
        tensor = tensor.detach().contiguous()
        if dtype == mx.bfloat16:  # numpy has no such type
            import torch

            return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def _load(file: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs torch: pip install 'mlx-transfusion[torch]', or save the weights as "
            ".safetensors"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that it refuses right after
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of old versions cannot be mapped
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt files raise types of zipfile, pickle, struct and torch
        # torch's own text recommends to load the file without this protection.
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {code[1]}, which could run code" if code else "it is damaged or no state dict"
        raise UserError(f"{file}: refused: {what}: save model.state_dict() again") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{file}: holds a {type(state).__name__}, expected a state dict")
    if other := [str(name) for name, value in state.items() if not torch.is_tensor(value)]:
        raise UserError(
            f"{file}: not a plain state dict ({some(other)}): torch.save(model.state_dict(), ...)"
        )
    return {str(name): value for name, value in state.items()}


def _dtype(tensor: Any, where: str) -> str:
    name = str(tensor.dtype)
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_meta:
        raise UserError(f"{where}: not a plain tensor: save a dense one")
    if name not in NAMES:
        raise UserError(f"{where}: has dtype {name}: save it as float32, float16 or bfloat16")
    return NAMES[name]
