"""How much a cache of keys and values takes, told from a config: no weight is allocated."""

from __future__ import annotations

import numpy as np

from mlx_transfusion.model_io import build
from mlx_transfusion.models.family import FamilyConfig

TEXT_TOKENS = 512
"""Tokens of text beside a picture, or of a chat, that memory is predicted for."""


def cache_bytes(config: FamilyConfig, bytes_a_number: int) -> int:
    """The cache of one picture and TEXT_TOKENS of text; twice, for guidance, where pictures are painted."""
    pictures = config.layout.picture_tokens
    rows = 2 if pictures else 1
    return rows * (pictures + TEXT_TOKENS) * numbers_a_token(config) * bytes_a_number


def numbers_a_token(config: FamilyConfig) -> int:
    """How many keys, values and the like one token leaves in the cache of a model of this config.

    Taken from the shapes of a pass that is never computed.
    """
    _, cache = build(config).prefill(np.array([[0]]), np.array([1]))
    return sum(part.size for layer in cache.layers if layer is not None for part in layer)
