"""A quantizer without weights, and a tiny model of its codes."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from autoencoder_tools import randomize

from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.latents import CODES, FORMAT

PALETTE = mx.array(list(itertools.product((0.0, 1.0), repeat=3)))


class ColourQuantizer:
    """Each square of `factor` pixels becomes the corner of the colour cube that is nearest to its mean."""

    codebook_size, factor = len(PALETTE), 4

    def encode_codes(self, pixels: mx.array) -> mx.array:
        b, h, w, _ = pixels.shape
        f = self.factor
        means = pixels.reshape(b, h // f, f, w // f, f, 3).mean((2, 4))
        return ((means[..., None, :] - PALETTE) ** 2).sum(-1).argmin(-1).astype(mx.int32)

    def decode_codes(self, codes: mx.array) -> mx.array:
        return mx.repeat(mx.repeat(PALETTE[codes], self.factor, 1), self.factor, 2)


@dataclass
class Found:
    """As `load_autoencoder` gives one."""

    model: ColourQuantizer = field(default_factory=ColourQuantizer)
    fingerprint: str = "0123456789abcdef"


def discrete_config(tokenizer: Tokenizer, **changes: object) -> DiscreteConfig:
    """Width 32, two layers, pictures of 2x2 codes (8x8 pixels)."""
    fields = {
        "vocab_size": tokenizer.vocab_size + 8, "codebook_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "image_height": 2, "image_width": 2, "max_position": 64,
    }  # fmt: skip
    return DiscreteConfig(**(fields | changes))  # type: ignore[arg-type]


def random_discrete(config: DiscreteConfig, seed: int = 0) -> Discrete:
    """A model whose weights all matter."""
    model = Discrete(config)
    randomize(model, seed, 0.4)
    return model


def write_codes(file: Path, codes: np.ndarray, names: list[str], fingerprint: str = "0" * 16) -> Path:
    """A file of codes int32 [N, V, h, w], as `autoencoder encode` writes it."""
    metadata = {
        "format": FORMAT, "autoencoder": fingerprint, "size": "8", "names": json.dumps(names),
    }  # fmt: skip
    mx.save_safetensors(str(file), {CODES: mx.array(codes)}, metadata)
    return file
