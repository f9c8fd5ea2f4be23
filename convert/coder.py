"""The autoencoder of a family whose own checkpoint holds none: --autoencoder, or the folder "vae"."""

from __future__ import annotations

from typing import NamedTuple

from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig

from .autoencoder import read_checkpoint
from .hub import locate
from .sources import Checkpoint, Source
from .table import Entry

CODER = "autoencoder."
"""In front of the autoencoder's names, in the plan and in our models."""


class Coder(NamedTuple):
    """An autoencoder as a part of a plan."""

    config: AutoencoderConfig
    checkpoint: Checkpoint
    entries: tuple[Entry, ...]


def open_coder(source: Source) -> Coder | None:
    """The autoencoder of --autoencoder (a folder or a hub id), else of the folder "vae" in SOURCE, else None.

    Raises UserError for one that is broken, and for a graph that ours is not.
    """
    if source.autoencoder is not None:
        place = locate(str(source.autoencoder))
    elif source.has("vae"):
        place = source.folder / "vae"
    else:
        return None
    file = (place if place.is_dir() else place.parent) / "config.json"
    config = AutoencoderConfig.from_diffusers(read_json(file), str(file))
    checkpoint = source.open(place.absolute())
    table = read_checkpoint(checkpoint, config)
    return Coder(config, checkpoint, tuple(entry.under(CODER, CODER) for entry in table))
