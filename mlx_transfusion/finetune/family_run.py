"""A converted model in training: with adapters in it, or all of it but what its family always leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_transfusion import lora
from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune.base import GROUPS
from mlx_transfusion.finetune.families import PARTS, Parts, check_paints, with_targets, within
from mlx_transfusion.finetune.idle import Idle
from mlx_transfusion.finetune.layers import Gate, flat_trained, insert, targets
from mlx_transfusion.finetune.step import write_adapter
from mlx_transfusion.lora_extract import base_name
from mlx_transfusion.model_files import read_safetensors
from mlx_transfusion.model_io import Loaded, load, read_config, save_model
from mlx_transfusion.model_path import display_name, is_adapter, resolve
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.objective import read_objective
from mlx_transfusion.quantization import dequantize
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.checkpoint import read_model
from mlx_transfusion.training.config import AdapterTraining, TrainConfig
from mlx_transfusion.training.encoded import EncodedPictures, Name
from mlx_transfusion.training.family_data import FamilyData
from mlx_transfusion.training.family_step import encoded
from mlx_transfusion.training.pixels import BYTES_PER_GIB


@dataclass(frozen=True)
class FamilyRun:
    """A model of another family, and what of it is trained."""

    loaded: Loaded
    teacher: Loaded | None
    """The diffusion model to distil; under an adapter that is the model itself without it."""
    config: TrainConfig
    parts: Parts
    names: list[str]
    """The linear layers that have an adapter; none: all weights are trained."""
    gate: Gate
    idle: list[Idle] = field(default_factory=list)
    """What is out of memory, of the model and then of a teacher of its own."""

    @property
    def text_frozen(self) -> bool:
        """Whether nothing that reads or writes text is trained."""
        return bool(self.names) and self.parts.paints_only(self.names)

    def weights(self) -> Any:
        """An adapter's arrays, or those of the modules that are not always frozen."""
        model = self.loaded.model
        if self.names:
            return tree_unflatten(list(flat_trained(model, self.names).items()))
        return {k: v for k, v in model.parameters().items() if k not in self.parts.frozen}

    @contextmanager
    def teaching(self) -> Iterator[PictureFamily]:
        """Inside, the model that is distilled."""
        assert self.teacher is not None
        self.gate.off = True
        try:
            yield self.teacher.pictures
        finally:
            self.gate.off = False

    def stage(self, data: Sequence[FamilyData]) -> None:
        """With `low_ram`: encode all pictures of the data, and only then read the weights that the steps need.

        A run without it has all weights in memory already. Raises UserError for a picture that cannot be read.
        """
        if not self.config.low_ram:
            return
        latents = self._encode_all(data)
        for one in data:
            one.use(latents)
        text = any(one.has_text for one in data)
        self._take_out(self.loaded, self.parts.idle(bool(self.names), text))
        if self.teacher is not None and self.teacher is not self.loaded:
            self._take_out(self.teacher, self.parts.idle(True, text=False))

    def _encode_all(self, data: Sequence[FamilyData]) -> EncodedPictures:
        names = {name: one for one in data for name in one.names()}
        model = self._read(self.loaded).pictures

        def encode(name: Name) -> np.ndarray:
            return np.array(encoded(model, names[name].pixels(name)))[0]

        room = int(self.config.data.cache_gib * BYTES_PER_GIB)
        return EncodedPictures(names, model.latent_shape, encode, room, Path(self.config.output))

    def _take_out(self, one: Loaded, modules: Sequence[str]) -> None:
        free = [name for name in modules if not any(within(adapted, [name]) for adapted in self.names)]
        self.idle.append(Idle(one.model, free, lambda: self._read(one).model))
        mx.eval(one.model.parameters())

    def _read(self, one: Loaded) -> Loaded:
        """A model as it was before training, none of its weights in memory yet."""
        out = load(one.path, dtype=_dtype(self.config), lazy=True)
        if not self.names:
            dequantize(out.model, mx.float32)
        return out

    def complete(self) -> AbstractContextManager[None]:
        """Inside, no module of the model is out of memory."""
        return self.idle[0].back() if self.idle else nullcontext()

    def save(self, folder: Path, model: Any, tokenizer: Tokenizer, extra: Mapping[str, Any] | None) -> object:
        """Write an adapter, or the whole model, into a folder that `load` reads. Raises UserError."""
        if not self.names:
            with self.complete():
                return save_model(folder, model, tokenizer, {**self._kept(), **(extra or {})})
        assert self.config.adapter is not None
        assert self.config.start is not None
        spec = self.config.adapter
        config = lora.AdapterConfig(
            model=base_name(self.config.start, folder),
            lora_parameters=lora.LoraParameters(spec.rank, spec.scale, tuple(self.names)),
            model_fingerprint=self.loaded.fingerprint,
            fine_tune_type=spec.type,
            objective=(extra or {}).get("objective"),
        )
        return write_adapter(folder, flat_trained(model, self.names), config)

    def read(self, folder: Path) -> Any:
        """What `save` wrote, as the tree of what is trained."""
        if self.names:
            return tree_unflatten(list(read_safetensors(lora.adapter_file(folder)).items()))
        return {k: v for k, v in read_model(folder).items() if k not in self.parts.frozen}

    def _kept(self) -> dict[str, Any]:
        """The tables of config.json that a model keeps when its weights change."""
        lost = ("quantization", "quantization_config", "training", "objective")
        return {k: v for k, v in self.loaded.extra.items() if k not in lost}


def family_run(config: TrainConfig) -> FamilyRun | None:
    """The run of a config that starts from a model of another family; None where it starts from none.

    Raises UserError for what such models cannot be trained with.
    """
    start = config.start
    if start is None:
        return None
    if config.model is not None and not Path(start).is_dir():
        return None  # a run of our own family goes on without the model that it began with
    kind = read_config(resolve(start))[0].model_type
    check_paints(kind, display_name(start, resolve(start)))
    if kind not in PARTS:
        return None
    _check(config, kind)
    loaded = load(start, dtype=_dtype(config), lazy=config.low_ram)
    if is_adapter(loaded.path) or read_objective(loaded.extra, loaded.name).consistency:
        raise UserError(
            f"model {loaded.name} is a student or an adapter: start from the diffusion model it came from, or fuse "
            "it first"
        )
    gate, names = Gate(), []
    if config.adapter is not None:
        names = _insert(loaded, with_targets(config.adapter, kind), config.seed, gate)
    else:
        dequantize(loaded.model, mx.float32)
    if not config.low_ram:
        mx.eval(loaded.model.parameters())
    return FamilyRun(loaded, _teacher(config, loaded, bool(names)), config, PARTS[kind], names, gate)


def _dtype(config: TrainConfig) -> mx.Dtype:
    return mx.bfloat16 if config.dtype == "bfloat16" else mx.float32


def _check(config: TrainConfig, kind: str) -> None:
    c = config.consistency
    wrong = {
        "[model]: a converted model has the sizes of its folder": config.model is not None,
        'consistency.student "painter": give an [adapter] table': c is not None and c.student == "painter",
        "consistency.guidance_range: give one guidance": c is not None and c.guidance_range is not None,
        "consistency.adaptive_weight": c is not None and c.adaptive_weight,
        'consistency.text "teacher"': c is not None and c.text == "teacher",
        'dtype "bfloat16" without [adapter]': config.dtype != "float32" and config.adapter is None,
        "data.latents: pictures are encoded by the model": bool(config.data.latents),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"training config: a {kind} model is not trained with {what}; leave it out")


def _insert(loaded: Loaded, spec: AdapterTraining, seed: int, gate: Gate) -> list[str]:
    """Put adapters into the model, over quantised matrices where the spec asks for that; returns their layers."""
    model, kind = loaded.model, loaded.config.model_type
    names = targets(model, spec)
    if spec.modality == "image" and not PARTS[kind].paints_only(names):
        other = next(name for name in names if not PARTS[kind].paints_only([name]))
        raise UserError(
            f"an image-only adapter of a {kind} model cannot have {other}, which text passes too: choose among "
            f"{', '.join(PARTS[kind].painting)}"
        )
    if spec.quantize is not None:
        linear = {n: m for n, m in model.named_modules() if n in names and isinstance(m, nn.Linear)}
        widths = {n: m.weight.shape[-1] for n, m in linear.items()}  # others have few bits already
        group = next((g for g in GROUPS if any(w % g == 0 for w in widths.values())), None)
        if widths and group is None:
            raise UserError(
                f"model {loaded.name}: no layer's width divides into groups of {GROUPS[-1]}: leave out the "
                "quantisation"
            )
        if group is not None:
            nn.quantize(
                model, group, spec.quantize, class_predicate=lambda n, _: widths.get(n, 1) % group == 0
            )
    return insert(model, spec, seed, gate)


def _teacher(config: TrainConfig, loaded: Loaded, adapted: bool) -> Loaded | None:
    c = config.consistency
    if c is None or c.teacher is None:
        return None
    if adapted:
        if resolve(c.teacher) != resolve(config.start):
            raise UserError(
                f"teacher {c.teacher}: a student with an [adapter] starts from its teacher: leave out init"
            )
        return loaded
    teacher = load(c.teacher, dtype=mx.float32, lazy=config.low_ram)
    if teacher.config != loaded.config or read_objective(teacher.extra, teacher.name).consistency:
        raise UserError(
            f"teacher {teacher.name}: expected a diffusion model of the same config as the student's start"
        )
    return teacher
