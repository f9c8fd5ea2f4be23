"""Where a model lies: the bundled one, a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from mlx_transfusion.errors import UserError

PAINTERS = ("emoji", "emoji-2step")
"""A diffusion model and its 2-step student."""

EDITOR = "emoji-edit"
"""The diffusion model, trained on to edit by instruction."""

BUNDLED = (*PAINTERS, EDITOR)
"""Models that come with the package, each the folder bundled/NAME."""

DEFAULT_MODEL = "emoji-2step"
"""The one of them that is used when none is named, but for edits."""

CONFIG_FILE = "config.json"
AUTOENCODER = "autoencoder"
"""Folder inside a model's: what turns its latents into pictures."""
ADAPTER_CONFIG = "adapter_config.json"
"""Stands in a folder that has only the difference from another model (lora.py)."""

# What a model folder may hold for us; never code.
HUB_FILES = ["*.json", "*model*.safetensors", "adapters.safetensors", "tokenizer.model"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str | os.PathLike[str] | None) -> Path:
    """The folder of a model.

    name: None (DEFAULT_MODEL), a name of BUNDLED, a folder (one that exists wins), or "org/name" of the
    Hugging Face hub, which is downloaded once. Raises UserError when there is no such model.
    """
    text = DEFAULT_MODEL if name is None else os.fspath(name)
    path = Path(text).expanduser()
    return _checked(path) if path.exists() else _named(text)


def resolve_beside(name: str, folder: Path) -> Path:
    """As `resolve`, for the name of a model in a file of `folder`: a folder's name is relative to that one.

    What the current folder holds has no say.
    """
    path = folder / name
    return _checked(path) if path.exists() else _named(name)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a difference from another model. One with a config of its own is a whole model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG_FILE).is_file()


def _named(text: str) -> Path:
    """A bundled model or one of the hub."""
    if text in BUNDLED:
        return _bundled(text)
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise UserError(
            f'model "{text}" does not exist: give a model folder, "org/name" of the Hugging Face hub, '
            f"or a bundled model: {', '.join(BUNDLED)}"
        )
    return _checked(_download(text))


def display_name(name: str | os.PathLike[str] | None, path: Path) -> str:
    """A model's name for people and for the settings in a picture: no folders of this machine in it."""
    if name is None:
        return DEFAULT_MODEL
    return os.fspath(name) if not Path(name).exists() else path.resolve().name


def _bundled(name: str) -> Path:
    path = Path(str(resources.files("mlx_transfusion") / "bundled" / name))
    if not (path / CONFIG_FILE).is_file() and not is_adapter(path):
        raise UserError(
            f'the bundled model "{name}" is missing from this installation: install the package again, '
            "or name another model with --model"
        )
    return path


def _checked(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not a model folder: expected a folder with {CONFIG_FILE} and weights")
    if not (path / CONFIG_FILE).is_file() and not is_adapter(path):
        raise UserError(f"{path} is not a model folder: it has no {CONFIG_FILE}")
    return path


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the client raises types of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'model "{repository}": no such folder, and the Hugging Face hub cannot give it: {reason}'
        ) from error
