"""A model as a folder of files, laid out as mlx-lm users know it: write it, read it back, quantise it.

config.json                   ModelConfig's fields, and the extra tables of EXTRA_KEYS
model.safetensors             weights, or model-00001-of-0000N.safetensors above 5 GiB
model.safetensors.index.json  which file holds which weight
tokenizer.model               SentencePiece (or tokenizer.json)

A folder can also hold nothing but the difference from another model, an adapter (lora.py); it is read the same way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_transfusion import lora
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import (
    EXTRA_KEYS,
    check_shapes,
    in_files,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from mlx_transfusion.model_path import (
    ADAPTER_CONFIG,
    AUTOENCODER,
    CONFIG_FILE,
    display_name,
    is_adapter,
    resolve,
)
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.family import Family, FamilyConfig, PictureFamily, TextFamily
from mlx_transfusion.models.transfusion import Coder, Transfusion, with_painter
from mlx_transfusion.objective import TOKENS
from mlx_transfusion.painting_defaults import GENERATION
from mlx_transfusion.quantization import dequantize, parameter_count, quantization_of, quantize_like
from mlx_transfusion.tokenizer import SpecialIds, Tokenizer

INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 << 30
FAMILIES = {
    "bagel": "bagel",
    "discrete": "discrete",
    "janusflow": "janusflow",
    "llama": "llama",
    "llama_painter": "llama_painter",
    "monoformer": "monoformer",
    "show_o2": "show_o2",
    "transfusion": "transfusion",
    "transfusion_pytorch": "lucidrains",
}
"""`model_type` of config.json -> module of `mlx_transfusion.models`, imported when it is needed."""


@dataclass
class Loaded:
    """A model ready for use."""

    model: TextFamily
    tokenizer: Tokenizer
    config: FamilyConfig
    path: Path
    name: str
    """Bundled name, hub id or folder name: what is recorded in pictures."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The tables of EXTRA_KEYS that config.json holds."""

    @property
    def pictures(self) -> PictureFamily:
        """The model, of a family that paints. Raises UserError for a language model."""
        if not isinstance(self.model, PictureFamily):
            raise UserError(f"model {self.name} only writes text: name a model that paints")
        return self.model

    def at_size(self, width: int, height: int) -> Loaded:
        """The same model, on the same weights, that paints pictures of that size in pixels.

        Of a model with patch_positions "coordinates" it may be another size than those that it learnt
        (`PictureFamily.sizes`), with a worse picture. Raises UserError for a size that the model cannot paint.
        """
        model = self.pictures.at_size(height, width)
        if model is self.model:
            return self
        out = replace(self, model=model, config=model.config)
        vars(out).update(
            {k: v for k, v in vars(self).items() if k == "fingerprint"}
        )  # where it is known already
        return out

    @property
    def transfusion(self) -> Transfusion:
        """The model, of the family that this package trains. Raises UserError for a converted one."""
        if not isinstance(self.model, Transfusion):
            raise UserError(
                f'model {self.name} is of type "{self.config.model_type}": this needs one of type "transfusion"'
            )
        return self.model

    @property
    def trainable(self) -> Transfusion | Discrete:
        """The model, of a family that this package trains from nothing. Raises UserError for a converted one."""
        return self.model if isinstance(self.model, Discrete) else self.transfusion

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the weight files' bytes: which weights these are.

        Of an adapter: of its scale, its file and the files of its base.
        """
        digest = hashlib.sha256()
        if is_adapter(self.path):
            digest.update(repr(lora.read_adapter_config(self.path).lora_parameters.scale).encode())
        for file in weight_files(self.path):
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()[:16]


def load(
    name: str | os.PathLike[str] | None = None, *, dtype: mx.Dtype | None = None, lazy: bool = False
) -> Loaded:
    """Read a model: None or a bundled name, a folder, or "org/name" of the Hugging Face hub.

    dtype: of the floating-point weights; None keeps the stored one, except on the CPU, where it is float32
    and quantised weights are expanded (half-precision and quantised products are 40 times slower there). An
    adapter is added to its base, whose quantised weights are expanded everywhere. lazy: read each weight of a whole
    model when it is first used, as in mlx-lm.
    Raises UserError for whatever is missing, corrupt or does not fit the config, and for an adapter whose base
    is not the one it was made for.
    """
    path = resolve(name)
    if is_adapter(path):
        return _load_adapter(path, display_name(name, path), dtype)
    config, extra = read_config(path)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if dtype is None and on_cpu:
        dtype = mx.float32
    model = build(config)
    weights = read_weights(path)
    if "quantization" in extra:
        quantize_like(model, weights, extra["quantization"], str(path))
    check_weights(model, weights, str(path))
    model.load_weights(list(weights.items()))
    if on_cpu and dequantize(model, dtype):
        extra = {k: v for k, v in extra.items() if not k.startswith("quantization")}
    if dtype is not None:
        model.set_dtype(dtype)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    attach_autoencoder(model, path / AUTOENCODER, fingerprint=_coder_fingerprint(extra))
    tokenizer = Tokenizer.load(path, special=special_ids(config))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size is "
            f"{config.vocab_size}: use the tokenizer that the model was trained with"
        )
    return Loaded(model, tokenizer, config, path, display_name(name, path), extra)


def _load_adapter(path: Path, name: str, dtype: mx.Dtype | None) -> Loaded:
    config, extra = read_config(path)
    adapter = lora.read_adapter_config(path)
    base = load(lora.base_folder(path, adapter))
    if base.fingerprint != adapter.model_fingerprint:
        raise UserError(
            f"{path}: this adapter belongs to {adapter.model} with weights {adapter.model_fingerprint}, and "
            f"{base.path} has weights {base.fingerprint}: use the right model, or extract the adapter again"
        )
    dequantize(base.model)
    start: nn.Module = base.model
    if isinstance(config, ModelConfig) and config.painter and not base.transfusion.config.painter:
        start = with_painter(base.transfusion)
    weights = lora.fuse(start, adapter, lora.read_adapter(path, adapter, start))
    model = build(config)  # what it predicts may differ from the base
    if isinstance(base.model, Transfusion):
        model.coder = base.model.coder
    check_weights(model, weights, str(path))
    model.load_weights(list(weights.items()))
    if dtype is not None:
        model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return Loaded(model, base.tokenizer, config, path, name, extra)


def family(model_type: Any, where: str = "config") -> Family:
    """The classes of a `model_type`. Raises UserError for an unknown one."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f'{where}: model_type is "{model_type}", expected one of {", ".join(FAMILIES)}')
    return import_module(f"mlx_transfusion.models.{FAMILIES[model_type]}").FAMILY


def build(config: FamilyConfig) -> Any:
    """A TextFamily with fresh (lazy, not yet allocated) weights. Raises UserError for an unknown `model_type`."""
    return family(config.model_type).model(config)


def special_ids(config: FamilyConfig) -> SpecialIds:
    """The structural token ids of a config, for `Tokenizer.load`."""
    c = config.layout
    eos = c.eos[0] if c.eos else None
    return SpecialIds(pad=c.pad, bos=c.bos, eos=eos, unk=c.unk, boi=c.boi, eoi=c.eoi)


def load_config(name: str | os.PathLike[str] | None = None) -> ModelConfig:
    """The config of a model of our own family, without its weights. Raises UserError as `load`."""
    path = resolve(name)
    config = read_config(path)[0]
    if not isinstance(config, ModelConfig):
        raise UserError(
            f'model {display_name(name, path)} is of type "{config.model_type}": this needs one of type "transfusion"'
        )
    return config


def read_config(path: Path) -> tuple[FamilyConfig, dict[str, Any]]:
    """config.json of a model folder: the model's fields, and the extra tables. Raises UserError.

    Of an adapter: its base's fields with its own over them, how the base paints, and its own objective.
    """
    if is_adapter(path):
        adapter = lora.read_adapter_config(path)
        base, extra = read_config(lora.base_folder(path, adapter))
        fields = base.to_dict() | adapter.config
        own = {GENERATION: extra[GENERATION]} if GENERATION in extra else {}
        own |= {} if adapter.objective is None else {"objective": adapter.objective}
        return type(base).from_dict(fields, f"{path / ADAPTER_CONFIG}: config"), own
    file = path / CONFIG_FILE
    data = read_json(file)
    extra = {key: data.pop(key) for key in EXTRA_KEYS if key in data}
    kind = family(data.get("model_type", "transfusion"), str(file))
    config = kind.config.from_dict(data, str(file))
    if codes := config.layout.picture_codes:  # the family says so, and no file needs to
        extra["objective"] = {"name": TOKENS, "codes": codes}
    return config, extra


# ---- weights ----


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model folder, by its index if it has one; an adapter's own, and those of its base.

    Raises UserError when there are none.
    """
    if is_adapter(path):
        adapter = lora.read_adapter_config(path)
        return [lora.adapter_file(path), *weight_files(lora.base_folder(path, adapter))]
    index = path / INDEX_FILE
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
            files = [path / name for name in sorted(names)]
        except (UserError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a readable weight index: {error}") from error
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{path}: weight files are missing: {', '.join(absent)}")
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} is not a model folder: it has no model.safetensors")
    return files


def read_weights(path: Path) -> dict[str, mx.array]:
    """All (lazy) weights of a model folder that is no adapter. Raises UserError for a corrupt file."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(path):
        weights |= read_safetensors(file)
    return weights


def check_weights(model: nn.Module, weights: Mapping[str, mx.array], where: str) -> None:
    """Raises UserError listing missing, unexpected and misshapen weights (mlx accepts some of the last)."""
    expected = {name: value.shape for name, value in flat_parameters(model).items()}
    check_shapes(expected, weights, f"{where}: the weights do not fit the config")


def save_model(
    folder: str | os.PathLike[str],
    model: TextFamily,
    tokenizer: Tokenizer | str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    dtype: mx.Dtype | None = None,
) -> Path:
    """Write a model folder (created when missing) that `load` reads; returns its path.

    extra: tables for config.json, from EXTRA_KEYS. dtype: of the stored floating-point weights (None: as they
    are). Every file is written under another name, synced and renamed, config.json last. Raises UserError
    when the folder cannot be written or the disk is full; files that were there before stay whole.
    """
    from mlx_transfusion.autoencoder.folder import autoencoder_fingerprint

    path = Path(folder)
    if unknown := sorted(set(extra or {}) - set(EXTRA_KEYS)):
        raise UserError(
            f"config.json has no place for {', '.join(unknown)}: expected {', '.join(EXTRA_KEYS)}"
        )
    config = model.config.to_dict() | dict(extra or {})
    if (quantization := quantization_of(model)) is not None:
        config |= {"quantization": quantization, "quantization_config": quantization}
    weights = {name: _stored(value, dtype) for name, value in sorted(flat_parameters(model).items())}
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer, special=special_ids(model.config))
    try:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
        _save_weights(path, weights, parameter_count(model))
        if isinstance(model, Transfusion | Discrete) and model.coder is not None:
            _link_autoencoder(model.coder.path, path / AUTOENCODER)
            config["coder"] = {"fingerprint": autoencoder_fingerprint(model.coder.path)}
        write_json(path / CONFIG_FILE, config)
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot write the model: {error}") from error
    return path


def attach_autoencoder(
    model: TextFamily, folder: Path, *, weights: bool = True, fingerprint: str | None = None
) -> None:
    """Give a model of latents or of codes the autoencoder in `folder`, if there is one; others stay as they are.

    weights: whether they are read; without them sizes are right, and pictures are noise. fingerprint: of the one
    that the model was trained with, where that is known. Raises UserError for a folder that is corrupt, whose latents
    or codes are of another kind or number, or that is another autoencoder (by its weights or its scale).
    """
    if not isinstance(model, Transfusion | Discrete) or not folder.is_dir():
        return
    from mlx_transfusion.autoencoder.folder import load_autoencoder, unread_autoencoder

    found = load_autoencoder(folder) if weights else unread_autoencoder(folder)
    if weights and fingerprint is not None and found.fingerprint != fingerprint:
        raise UserError(
            f"{folder}: has the fingerprint {found.fingerprint}, and the model was trained with autoencoder "
            f"{fingerprint}: put that one there"
        )
    if isinstance(model, Discrete):
        model.attach(found.codes, folder)
        return
    coder = found.latents
    if coder.config.latent_channels != model.config.image_channels:
        raise UserError(
            f"{folder}: its latents have {coder.config.latent_channels} channels, and the model paints "
            f"{model.config.image_channels}: use the autoencoder that the model was trained with"
        )
    model.coder = Coder(coder, folder, found.preview)


def _coder_fingerprint(extra: Mapping[str, Any]) -> str | None:
    """The fingerprint in the table `coder` of config.json; folders of before have none."""
    table = extra.get("coder")
    return table.get("fingerprint") if isinstance(table, dict) else None


def _link_autoencoder(source: Path, target: Path) -> None:
    """What reading an autoencoder's folder takes, not what training it took.

    Its files never change, so a second name for them is enough; a copy where the file system has none.
    """
    target.mkdir(exist_ok=True)
    previews = [file for file in (source / "preview.safetensors", source / INDEX_FILE) if file.is_file()]
    for file in (source / CONFIG_FILE, *weight_files(source), *previews):
        new = target / file.name
        if new.exists():
            continue
        try:
            os.link(file, new)
        except OSError:
            shutil.copyfile(file, new)


def flat_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Parameters by their dotted names."""
    return dict(tree_flatten(model.parameters()))


def _stored(value: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return value.astype(dtype) if dtype is not None and mx.issubdtype(value.dtype, mx.floating) else value


def _save_weights(path: Path, weights: dict[str, mx.array], parameters: int) -> None:
    shards = in_files(weights, MAX_FILE_BYTES)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        write_safetensors(path / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(value.nbytes for value in weights.values())
    metadata = {"total_size": size, "total_parameters": parameters}
    write_json(path / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
