"""Our own model from a PyTorch (or safetensors) state dict that uses our parameter names, and model folders of ours.

Linear layers, embeddings and norms are laid out alike in PyTorch and MLX, so no tensor needs arithmetic here
(convolutions of a U-Net are expected as MLX has them, [out, height, width, in]), and the table of names and shapes is
the model's own tree of parameters. The way back is the same names: `mx.load` of the folder is the state dict.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import EXTRA_KEYS, read_json
from mlx_transfusion.model_io import build, flat_parameters
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.quantization import quantize_like

from .quantize import Options
from .run import convert, plan_of
from .sources import Source
from .table import Card, Converter, Entry, Plan, Precision, usual_precision

FAMILY = "transfusion"


def entries(
    config: ModelConfig, quantization: dict[str, Any] | None = None, names: frozenset[str] = frozenset()
) -> list[Entry]:
    """Every parameter under its own name. quantization: the table of a folder whose stored `names` are quantised."""
    model = build(config)
    if quantization is not None:
        quantize_like(model, names, quantization, CONFIG_FILE)
    return [
        Entry(name, name, value.shape, packed=value.dtype in (mx.uint32, mx.uint8))
        for name, value in sorted(flat_parameters(model).items())
    ]


def precision(path: str) -> Precision:
    """As `usual_precision`; the U-Net and the layers of patches and angles are small and every pixel passes them."""
    return (
        usual_precision(path)
        if path.startswith(("embed_tokens", "lm_head", "layers.", "painter.layers."))
        else Precision.WHOLE
    )


def plan(source: Source) -> Plan:
    """With --config strictly ModelConfig's fields; else those of SOURCE's own config.json, and its extra tables.

    Raises UserError for a config or tokenizer that is missing or wrong.
    """
    extra: dict[str, Any] = {}
    if source.config is not None:
        file = source.config / CONFIG_FILE if source.config.is_dir() else source.config
        data = read_json(file)
    else:
        file = source.folder / CONFIG_FILE
        data = read_json(file)
        extra = {key: data.pop(key) for key in EXTRA_KEYS if key in data}
    config = ModelConfig.from_dict(data, str(file))
    files = source.tokenizer_files()
    if not files:
        raise UserError(
            f"{source.tokenizer or source.folder}: no such tokenizer file: name one with --tokenizer"
        )
    extra.pop("quantization_config", None)
    quantization = extra.pop("quantization", None)
    checkpoint = source.open()
    return Plan(
        FAMILY,
        config.to_dict(),
        {"": checkpoint},
        tuple(entries(config, quantization, frozenset(checkpoint.tensors))),
        files,
        Card(source.name or source.folder.name, "unknown", "It is for whoever trained the model to say."),
        precision,
        quantization,
        extra,
    )


def detect(source: Source) -> bool:
    """By --config, which no other family takes, or config.json's model_type."""
    return source.config is not None or source.json(CONFIG_FILE).get("model_type") == FAMILY


def convert_state(
    source: str | os.PathLike[str],
    config_path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: mx.Dtype | None = None,
) -> Path:
    """Write the model folder `output`, which `mlx_transfusion.load` reads, and return its path.

    config_path: a config.json with ModelConfig's fields, or the folder of one. tokenizer_path: tokenizer.model or
    tokenizer.json, or the folder of one. dtype: of the stored weights; None keeps each as it is, bit for bit.
    Raises UserError, with nothing left behind, when a tensor is missing, unexpected, of a wrong shape or no
    floating-point one (all such are listed), when a value does not fit into `dtype`, when an input cannot be read,
    and when `output` exists or cannot be written.
    """
    given = Source(Path(source), config=Path(config_path), tokenizer=Path(tokenizer_path))
    return convert(plan_of(given, Options(dtype=dtype), FAMILY), Path(output))


CONVERTER = Converter(
    FAMILY, "our own model, from a state dict with our names (--config, --tokenizer)", detect, plan
)
