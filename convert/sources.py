"""Reading the weights of a foreign checkpoint: safetensors or torch files, one or several.

Nothing here knows names or shapes; `state_dict.py` and later families judge what these functions read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.errors import UserError

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth", ".bin")
INDEX = ".index.json"
MAX_NAMED = 5
"""Most names that a message lists when any number of them says the same thing."""


def read_state_dict(source: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint by name; those of safetensors files are lazy.

    source: a .safetensors, .pt, .pth or .bin file, a `*.index.json` file that names several of them, or a
    folder that holds one checkpoint (an index, or a single such file). Raises UserError for a file that is
    missing, corrupt, or holds anything besides named tensors; for shards that do not agree with their index;
    for torch files where torch is not installed.
    """
    file = _only_checkpoint(source) if source.is_dir() else source
    return _read_shards(file) if file.name.endswith(INDEX) else _read_file(file)


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder; safetensors before torch, an index before the files it names."""
    for found in (
        sorted(folder.glob(f"*{SAFETENSORS}{INDEX}")),
        sorted(folder.glob(f"*{SAFETENSORS}")),
        sorted(folder.glob(f"*{INDEX}")),
        sorted(path for suffix in TORCH for path in folder.glob(f"*{suffix}")),
    ):
        if len(found) > 1:
            raise UserError(f"{folder}: holds {len(found)} checkpoints ({_some(found)}): give one file")
        if found:
            return found[0]
    raise UserError(f"{folder}: holds no {', '.join((SAFETENSORS, *TORCH))} and no {INDEX} file")


def _read_shards(index: Path) -> dict[str, mx.array]:
    """The files of an index, and nothing but the tensors that it names, each from the file that it names."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a weight index: expected an object with a weight_map") from error
    names = list(places.values())
    if bad := [n for n in names if not (isinstance(n, str) and n and Path(n).name == n)]:
        raise UserError(f"{index}: {bad[0]!r} is not the name of a file beside the index")
    weights: dict[str, mx.array] = {}
    for name in sorted(set(names)):
        shard = _read_file(index.with_name(name))
        promised = {tensor for tensor, place in places.items() if place == name}
        if differing := sorted(promised ^ shard.keys()):
            raise UserError(
                f"{index}: does not agree with {name} about {_some(differing)}: copy or download both again"
            )
        weights |= shard
    return weights


def _read_file(file: Path) -> dict[str, mx.array]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == SAFETENSORS:
        try:
            return dict(mx.load(str(file)))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file}: cannot read the weights: {error}") from error
    if file.suffix in TORCH:
        return _read_torch(file)
    raise UserError(f"{file}: expected a {', '.join((SAFETENSORS, *TORCH))} or {INDEX} file")


def _read_torch(file: Path) -> dict[str, mx.array]:
    """The tensors of a torch file, read without running any code that the file may hold."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs torch: pip install 'mlx-transfusion[torch]', or save the weights as "
            f"{SAFETENSORS}"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that it refuses right after
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
            f"{file}: not a plain state dict ({_some(other)}): torch.save(model.state_dict(), ...)"
        )
    return {str(name): _to_mlx(torch, value, f"{file}: {name}") for name, value in state.items()}


def _to_mlx(torch: Any, tensor: Any, where: str) -> mx.array:
    """A torch tensor as an array with the same bits. `torch` is the module, which is not imported above."""
    names = ("float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type
            return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        if str(tensor.dtype).removeprefix("torch.") in names:
            return mx.array(tensor.numpy())
    except (RuntimeError, TypeError) as error:  # sparse, quantised and meta tensors
        raise UserError(f"{where}: not a plain tensor: {error}") from error
    raise UserError(f"{where}: has dtype {tensor.dtype}: save it as float32, float16 or bfloat16")


def _some(names: list[Any]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(name.name if isinstance(name, Path) else str(name) for name in names[:MAX_NAMED])
    return shown + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
