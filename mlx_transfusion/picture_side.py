"""A language model's folder becomes that of a model that also paints, and stays the language model it was.

The text's weight files are shared with the folder they came from (hard links where the disk allows it), whatever
their precision; the picture side has a file of its own, float32, beside them:

model*.safetensors          the text's, untouched
model-painter.safetensors   the picture side
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.chat import SETTINGS_FILE, TEMPLATE_FILE, ChatTemplate
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_safetensors, write_json, write_safetensors
from mlx_transfusion.model_io import INDEX_FILE, flat_parameters, load, read_config, weight_files
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.models.llama import Llama, LlamaConfig
from mlx_transfusion.models.llama_painter import LlamaPainter, with_picture_side
from mlx_transfusion.models.llama_painter_config import LlamaPainterConfig
from mlx_transfusion.quantization import dequantize, parameter_count
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, Tokenizer

PAINTER_FILE = "model-painter.safetensors"
PAINTER = "painter."
SHARED = (HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, TEMPLATE_FILE)
"""Files that the new folder has as the old one has them."""
SAID = "\ue000"
"""Stands for what the user says while the chat template runs."""


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are made."""

    image_size: int = 32
    patch_size: int = 8
    rank: int = 0
    """0: experts, copies of the text's layers; else the rank of factors beside them."""
    every: int = 1
    """One layer of the picture side for so many of the text's."""
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    image_std: float = 1.0
    seed: int = 0


def extend(name: str | os.PathLike[str], output: Path, options: PictureOptions) -> Path:
    """Write the language model `name` with an untrained picture side into the new folder `output`; returns it.

    Raises UserError for a model of another family, one whose vocabulary has no two tokens to spare, impossible
    sizes, and a folder that cannot be written.
    """
    base = load(name, dtype=mx.float32)
    if type(base.model) is not Llama:
        raise UserError(
            f'model {base.name} is of type "{base.config.model_type}": a picture side is for one of type "llama"'
        )
    dequantize(base.model, mx.float32)
    before, after = prompt_around(base.path, base.tokenizer, base.config.layout.bos)
    boi, eoi = spare_tokens(base.tokenizer, [*before, *after, *base.config.layout.eos], base.name)
    theirs = {f.name: getattr(base.config, f.name) for f in fields(LlamaConfig) if f.name != "model_type"}
    config = LlamaPainterConfig(
        **theirs,
        image_height=options.image_size,
        image_width=options.image_size,
        patch_size=options.patch_size,
        painter_rank=options.rank,
        painter_every=options.every,
        image_mean=options.image_mean,
        image_std=options.image_std,
        boi_token_id=boi,
        eoi_token_id=eoi,
        prompt_before=tuple(before),
        prompt_after=tuple(after),
    )
    mx.random.seed(options.seed)
    return write_folder(output, base.path, with_picture_side(base.model, config))


def prompt_around(folder: Path, tokenizer: Tokenizer, bos: int | None) -> tuple[list[int], list[int]]:
    """Tokens of a user's turn before and behind what is said; without a chat template BOS and nothing."""
    template = ChatTemplate.load(folder)
    if template is None:
        return [] if bos is None else [bos], []
    before, said, after = template.render([{"role": "user", "content": SAID}]).partition(SAID)
    if not said:
        raise UserError(f"{folder}: the chat template leaves out what the user says")
    return tokenizer.encode_template(before), tokenizer.encode_template(after)


def spare_tokens(tokenizer: Tokenizer, used: Sequence[int], name: str) -> tuple[int, int]:
    """The last two special tokens that neither chats nor texts use. Raises UserError when there are none."""
    known = {
        i for i in (tokenizer.special.pad, tokenizer.special.bos, tokenizer.special.eos) if i is not None
    }
    free = sorted(set(tokenizer.control_tokens.values()) - known - set(used))
    if len(free) < 2:
        raise UserError(
            f"model {name}: its vocabulary has {len(free)} special tokens that it does not use, and pictures need two"
        )
    return free[-1], free[-2]


def write_folder(
    folder: Path, base: Path, model: LlamaPainter, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the picture side of `model`, and link the text's files of the model folder `base`; returns `folder`.

    extra: tables for config.json besides the base's own. Raises UserError when the folder cannot be written.
    """
    texts = [file for file in weight_files(base) if file.name != PAINTER_FILE]
    shared = [*texts, *(base / name for name in SHARED if (base / name).is_file())]
    side = {name: value for name, value in flat_parameters(model).items() if name.startswith(PAINTER)}
    stored = {file.name: read_safetensors(file) for file in texts} | {PAINTER_FILE: side}
    index = {
        "metadata": {
            "total_size": sum(v.nbytes for arrays in stored.values() for v in arrays.values()),
            "total_parameters": parameter_count(model),
        },
        "weight_map": {name: file for file, arrays in stored.items() for name in arrays},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in shared:
            _share(file, folder / file.name)
        write_safetensors(folder / PAINTER_FILE, side)
        write_json(folder / INDEX_FILE, index)
        tables = {k: v for k, v in read_config(base)[1].items() if k != "training"} | dict(extra or {})
        write_json(folder / CONFIG_FILE, model.config.to_dict() | tables)
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        raise UserError(f"{folder}: cannot write the model: {error}") from error
    return folder


def _share(file: Path, target: Path) -> None:
    """The same bytes in another folder. All our writers replace files, none changes one in place."""
    target.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, target)
