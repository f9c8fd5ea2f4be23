"""What a user names as SOURCE: a folder, a file or a hub id; the checkpoints and small files in it, opened on demand.

Nothing here knows names or shapes of tensors: families judge what is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE

from .safetensors_file import SafetensorsFile, TensorInfo, some
from .torch_file import SUFFIXES as TORCH
from .torch_file import TorchFile

SAFETENSORS, GGUF = ".safetensors", ".gguf"
INDEX = ".index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
USUAL_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Where several checkpoints lie in one folder, as in half precision beside full, one of these is meant."""
MAX_LAYERS = 1000
"""More than any model has."""


class Checkpoint(Protocol):
    """Named tensors that are read one by one."""

    where: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> mx.array:
        """One tensor in its foreign layout. Raises UserError for one that cannot be read."""


@dataclass
class Source:
    """One SOURCE of the command line, with the flags that add to it."""

    path: Path
    """File or folder."""
    name: str = ""
    """As the user wrote it: a hub id, or the folder's name."""
    config: Path | None = None
    """--config: a config.json of our own fields, for checkpoints without one."""
    tokenizer: Path | None = None
    """--tokenizer: a tokenizer file or the folder of one."""
    autoencoder: Path | None = None
    """--autoencoder: folder or file of an AutoencoderKL, for families that keep theirs elsewhere."""
    _opened: dict[Path, Checkpoint] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The folder that small files are read from."""
        return self.path if self.path.is_dir() else self.path.parent

    def json(self, name: str = "config.json") -> dict[str, Any]:
        """An object of the folder; {} without such a file. Raises UserError for a broken one."""
        file = self.folder / name
        if not file.is_file():
            return {}
        data = read_json(file)
        _check_depth(data, file)
        return data

    def has(self, name: str) -> bool:
        """Whether the folder holds that file (or folder)."""
        return (self.folder / name).exists()

    def open(self, name: str | Path = "") -> Checkpoint:
        """A checkpoint: the one that SOURCE is, a file or subfolder of its folder, or another path; opened once.

        Only headers are read. Raises UserError for a missing or corrupt one.
        """
        path = self.folder / name if name else self.path
        if path not in self._opened:
            self._opened[path] = open_checkpoint(path)
        return self._opened[path]

    def names(self, name: str | Path = "") -> frozenset[str]:
        """Names of that checkpoint's tensors; none where it cannot be opened (for `detect`)."""
        try:
            return frozenset(self.open(name).tensors)
        except UserError:
            return frozenset()

    def tokenizer_files(self) -> dict[str, bytes | Path]:
        """The tokenizer's files by the names that they get: of --tokenizer, else of the folder.

        Raises UserError for a file of another kind.
        """
        place = self.tokenizer or self.folder
        if place.is_file():
            return {_tokenizer_name(place): place}
        return {name: place / name for name in TOKENIZER_FILES if (place / name).is_file()}


def _tokenizer_name(file: Path) -> str:
    """What a tokenizer's file, however it is called, is called in a model folder."""
    for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE):
        if file.suffix == Path(name).suffix:
            return name
    raise UserError(f"{file}: expected a {HUGGINGFACE_FILE} or a {SENTENCEPIECE_FILE} as --tokenizer")


def _check_depth(value: Any, file: Path) -> None:
    """Raises UserError for a number of layers whose table of tensors would fill the memory."""
    for key, part in value.items():
        if isinstance(part, dict):
            _check_depth(part, file)
        elif ("layers" in key or "depth" in key) and isinstance(part, int | float) and part > MAX_LAYERS:
            raise UserError(f"{file}: {key} is {part}, expected at most {MAX_LAYERS}: the config is damaged")


def open_checkpoint(path: Path) -> Checkpoint:
    """A .safetensors or torch file, an index that names several of them, or the folder of one checkpoint.

    Raises UserError for a file that is missing, corrupt, or holds anything besides named tensors; for shards that
    do not agree with their index; for torch files where torch is not installed.
    """
    file = _only_checkpoint(path) if path.is_dir() else path
    return _Shards(file) if file.name.endswith(INDEX) else _open_file(file)


class _Shards:
    """The files of an index, and nothing but the tensors that it names, each from the file that it names."""

    def __init__(self, index: Path) -> None:
        self.where = index
        self._place: dict[str, Checkpoint] = {}
        places = _read_index(index)
        for name in sorted(set(places.values())):
            shard = _open_file(index.with_name(name))
            promised = {tensor for tensor, place in places.items() if place == name}
            if differing := sorted(promised ^ shard.tensors.keys()):
                raise UserError(
                    f"{index}: does not agree with {name} about {some(differing)}: copy or download both again"
                )
            self._place |= dict.fromkeys(shard.tensors, shard)
        self.tensors: Mapping[str, TensorInfo] = {n: shard.tensors[n] for n, shard in self._place.items()}

    def read(self, name: str) -> mx.array:
        """One tensor."""
        return self._place[name].read(name)


def _read_index(index: Path) -> dict[str, str]:
    try:
        places = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a weight index: expected an object with a weight_map") from error
    names = list(places.values())
    if bad := [n for n in names if not (isinstance(n, str) and n and "\0" not in n and Path(n).name == n)]:
        raise UserError(f"{index}: {bad[0]!r} is not the name of a file beside the index")
    return places


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder; safetensors before torch, an index before the files it names."""
    for found in (
        sorted(folder.glob(f"*{SAFETENSORS}{INDEX}")),
        sorted(folder.glob(f"*{SAFETENSORS}")),
        sorted(folder.glob(f"*{INDEX}")),
        sorted(path for suffix in TORCH for path in folder.glob(f"*{suffix}")),
    ):
        usual = [file for file in found if file.name.removesuffix(INDEX) in USUAL_NAMES]
        if len(found) > 1 and len(usual) != 1:
            raise UserError(f"{folder}: holds {len(found)} checkpoints ({some(found)}): give one file")
        if found:
            return (usual or found)[0]
    raise UserError(f"{folder}: holds no {', '.join((SAFETENSORS, *TORCH))} and no {INDEX} file")


def _open_file(file: Path) -> Checkpoint:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == SAFETENSORS:
        return SafetensorsFile(file)
    if file.suffix == GGUF:
        from .gguf import GGUFFile

        return GGUFFile(file)
    if file.suffix in TORCH:
        return TorchFile(file)
    raise UserError(f"{file}: expected a {', '.join((SAFETENSORS, GGUF, *TORCH))} or {INDEX} file")
