"""A SOURCE that is no file or folder here: a repository of the Hugging Face hub, and only what is needed of it."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_transfusion.errors import UserError

from .sources import GGUF, SAFETENSORS
from .torch_file import SUFFIXES as TORCH

SMALL = (".json", ".jinja", ".txt", "tokenizer.model")
"""Endings of the files that are always fetched; code never is."""
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")


def locate(name: str) -> Path:
    """The file or folder that SOURCE means; what exists here wins, "org/name" is downloaded once.

    "org/name/vae" is a subfolder of a repository, "org/name/file.gguf" one of its files. Raises UserError when there
    is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    found = _HUB_ID.fullmatch(name)
    if found is None or name.startswith(("/", ".")) or (path.parent.is_dir() and path.parent != Path()):
        raise UserError(
            f'{name}: no such file or folder: give a checkpoint, or "org/name" of the Hugging Face hub'
        )
    return _download(found[1], (found[2] or "").strip("/"))


def _download(repository: str, inside: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = wanted(HfApi().list_repo_files(repository), inside)
        folder = Path(snapshot_download(repository, allow_patterns=files)) if files else None
    except Exception as error:  # the client raises types of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repository}: no such file or folder, and the Hugging Face hub cannot give it: {reason}"
        ) from error
    if folder is None:
        raise UserError(
            f"{repository}: holds no weights{f' in {inside}' if inside else ''} that can be converted"
        )
    return folder / inside


def wanted(files: list[str], inside: str = "") -> list[str]:
    """Of a repository's files: the small ones and the weights of one folder, safetensors before torch before GGUF.

    inside: a folder, or a single file beside which small ones lie; empty for the top. Empty without weights.
    """
    if inside in files:
        folder = str(Path(inside).parent) if "/" in inside else ""
        return [inside, *(f for f in _of_folder(files, folder) if f.endswith(SMALL))]
    here = _of_folder(files, inside)
    for endings in ((SAFETENSORS,), TORCH, (GGUF,)):
        if weights := [f for f in here if f.endswith(endings)]:
            return [*weights, *(f for f in here if f.endswith(SMALL))]
    return []


def _of_folder(files: list[str], folder: str) -> list[str]:
    return [f for f in files if f.rpartition("/")[0] == folder]
