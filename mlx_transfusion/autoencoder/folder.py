"""An autoencoder as a folder: config.json, model.safetensors, and preview.safetensors where it was trained here."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_transfusion.autoencoder.preview import Preview
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import EXTRA_KEYS, read_json, read_safetensors, write_json, write_safetensors
from mlx_transfusion.model_io import check_weights, flat_parameters, read_weights, weight_files
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_config import MODEL_TYPE
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ, build_autoencoder

WEIGHTS_FILE, PREVIEW_FILE = "model.safetensors", "preview.safetensors"
SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass
class LoadedAutoencoder:
    """An autoencoder ready for use."""

    model: AutoencoderKL | AutoencoderVQ
    path: Path
    preview: Preview | None
    """The linear map from its latents to small pictures, where the folder holds one."""

    @property
    def config(self) -> AutoencoderConfig:
        """Its configuration."""
        return self.model.config

    @property
    def codes(self) -> AutoencoderVQ:
        """The model, where it has a codebook. Raises UserError for one that has none."""
        if not isinstance(self.model, AutoencoderVQ):
            raise UserError(
                f"{self.path}: has no codebook: name an autoencoder that was trained with [model.quantizer]"
            )
        return self.model

    @property
    def latents(self) -> AutoencoderKL:
        """The model, where its latents are continuous. Raises UserError for one with a codebook."""
        if not isinstance(self.model, AutoencoderKL):
            raise UserError(
                f"{self.path}: has a codebook of {self.model.codebook_size} codes, and a model of latents needs an "
                "autoencoder without one (KL)"
            )
        return self.model

    def encode_codes(self, pixels: mx.array | np.ndarray) -> mx.array:
        """As `AutoencoderVQ.encode_codes`: pixels [B, H, W, 3] in [0, 1] -> int32 [B, h, w]. Raises UserError."""
        return self.codes.encode_codes(mx.array(pixels))

    def decode_codes(self, codes: mx.array | np.ndarray) -> mx.array:
        """As `AutoencoderVQ.decode_codes`: int [B, h, w] -> pixels [B, H, W, 3] in [0, 1]. Raises UserError."""
        return self.codes.decode_codes(mx.array(codes))

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of its weights' bytes and the scale of its latents."""
        return autoencoder_fingerprint(self.path)


def autoencoder_fingerprint(path: Path) -> str:
    """`LoadedAutoencoder.fingerprint` of a folder whose weights are not read. Raises UserError as `read_config`."""
    config = read_config(path)
    scale = {name: getattr(config, name) for name in SCALE_FIELDS}
    digest = hashlib.sha256(json.dumps(scale, sort_keys=True).encode())
    for file in weight_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_autoencoder(folder: str | os.PathLike[str]) -> LoadedAutoencoder:
    """Read a folder that `save_autoencoder` or `convert` wrote; weights as float32.

    Raises UserError for a folder that is missing, diffusers' own, or corrupt.
    """
    path = Path(folder)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no folder of an autoencoder: it has no {CONFIG_FILE}")
    config = read_config(path)
    model = build_autoencoder(config)
    weights = read_weights(path)
    check_weights(model, weights, str(path))
    model.load_weights(list(weights.items()))
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    file = path / PREVIEW_FILE
    preview = Preview.from_arrays(read_safetensors(file), config, str(file)) if file.is_file() else None
    return LoadedAutoencoder(model, path, preview)


def unread_autoencoder(folder: Path) -> LoadedAutoencoder:
    """A folder's autoencoder with fresh weights, to be asked for sizes. Raises UserError as `read_config`."""
    return LoadedAutoencoder(build_autoencoder(read_config(folder)), folder, None)


def read_config(path: Path) -> AutoencoderConfig:
    """config.json of such a folder. Raises UserError for another model's and for diffusers'."""
    file = path / CONFIG_FILE
    data = {key: value for key, value in read_json(file).items() if key not in EXTRA_KEYS}
    if data.get("_class_name") == "AutoencoderKL":
        raise UserError(f"{path}: is diffusers' folder: convert it first (mlx-transfusion convert)")
    if data.get("model_type") != MODEL_TYPE:
        raise UserError(f'{file}: model_type is {data.get("model_type")!r}, expected "{MODEL_TYPE}"')
    return AutoencoderConfig.from_dict(data, str(file))


def save_autoencoder(
    folder: str | os.PathLike[str],
    model: AutoencoderKL | AutoencoderVQ,
    config: AutoencoderConfig | None = None,
    preview: Preview | None = None,
) -> Path:
    """Write a folder that `load_autoencoder` reads; config.json, of `config` or the model's own, comes last.

    Raises UserError when it cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_safetensors(path / WEIGHTS_FILE, flat_parameters(model))
        if preview is not None:
            write_safetensors(path / PREVIEW_FILE, preview.arrays())
        write_json(path / CONFIG_FILE, (config or model.config).to_dict())
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot write the autoencoder: {error}") from error
    return path
