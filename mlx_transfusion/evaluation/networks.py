"""Networks that a user converts for `evaluate`: InceptionV3 for FID's features, CLIP for pictures and captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.features import FeatureExtractor, default_extractor
from mlx_transfusion.model_files import EXTRA_KEYS, read_json
from mlx_transfusion.model_io import check_weights, read_weights, weight_files
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.models import clip, inception
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE

START, END = "<|startoftext|>", "<|endoftext|>"
"""Around each caption of CLIP's."""


def load_extractor(folder: Path | None) -> FeatureExtractor:
    """The network of a folder that `convert` wrote; None is EfficientNet-Lite0, whose weights are a package.

    Raises UserError for a folder of anything else, a damaged one, and a package that is not installed.
    """
    if folder is None:
        return default_extractor()
    kind = _config(folder).get("model_type")
    if kind == inception.MODEL_TYPE:
        return InceptionFeatures(folder)
    if kind == clip.MODEL_TYPE:
        return ClipFeatures(folder)
    raise UserError(
        f"{folder}: model_type is {kind!r}, expected an InceptionV3 or CLIP that mlx-transfusion convert made"
    )


class InceptionFeatures:
    """The 2048 features that FID compares."""

    name = "InceptionV3"

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder that is missing, damaged or of another network."""
        inception.InceptionConfig.from_dict(_config(folder), str(folder / CONFIG_FILE))
        self._network = inception.InceptionV3()
        self.fingerprint = _load(self._network, folder, inception.MODEL_TYPE)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, 2048]"""
        return np.array(self._network(mx.array(pixels).astype(mx.float32) / 255))


class ClipFeatures:
    """The vectors of pictures and of texts in CLIP's common space, of the length that the network gives them."""

    name = "CLIP"

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder that is missing, damaged or of another network, or without a tokenizer."""
        import tokenizers

        data = _config(folder)
        if data.get("model_type") != clip.MODEL_TYPE:
            raise UserError(f"{folder}: model_type is {data.get('model_type')!r}, expected a converted CLIP")
        config = clip.ClipConfig.from_dict(data, str(folder / CONFIG_FILE))
        self._network = clip.Clip(config)
        self.fingerprint = _load(self._network, folder, clip.MODEL_TYPE)
        file = folder / HUGGINGFACE_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{file}: cannot read CLIP's tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        start, end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if start is None or end is None or self._tokenizer.get_vocab_size() > config.text.vocab_size:
            raise UserError(
                f"{file}: not the tokenizer of this CLIP: it lacks {START} or {END}, or is too large"
            )
        self._start, self._end = start, end

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, P]"""
        size = self._network.config.vision.image_size
        ready = np.stack([centred(p, size) for p in pixels])
        return np.array(self._network.embed_pictures(mx.array(ready).astype(mx.float32) / 255))

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """float32 [B, P]. A caption that is longer than CLIP's context is cut."""
        ids = [self._ids(caption) for caption in captions]
        longest = max(len(i) for i in ids)
        padded = np.array([i + [self._end] * (longest - len(i)) for i in ids], np.int32)
        lengths = mx.array([len(i) for i in ids])
        return np.array(self._network.embed_texts(mx.array(padded), lengths))

    def _ids(self, caption: str) -> list[int]:
        inner = self._tokenizer.encode(caption, add_special_tokens=False).ids
        return [self._start, *inner[: self._network.config.text.max_position_embeddings - 2], self._end]


def centred(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3] as CLIP's processor: shorter side to `size`, bicubic, centre cut out."""
    picture = Image.fromarray(pixels)
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE}: expected a folder that mlx-transfusion convert made")
    return {key: value for key, value in read_json(folder / CONFIG_FILE).items() if key not in EXTRA_KEYS}


def _load(network: nn.Module, folder: Path, name: str) -> str:
    """Put the folder's weights into the network, as float32; returns what changes with them."""
    weights = read_weights(folder)
    check_weights(network, weights, str(folder))
    network.load_weights(list(weights.items()))
    network.set_dtype(mx.float32)
    network.eval()
    mx.eval(network.parameters())
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{name}/{digest.hexdigest()}"
