"""The step of a training run whose weights are an adapter's; loop, optimiser and checkpoints are `train`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_transfusion import lora
from mlx_transfusion.adapters import PAINTER, Adapter, with_adapters
from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune.base import Base
from mlx_transfusion.finetune.layers import flat_trained
from mlx_transfusion.lora_extract import base_name
from mlx_transfusion.model_files import read_safetensors, write_json, write_safetensors
from mlx_transfusion.model_io import load
from mlx_transfusion.model_path import ADAPTER_CONFIG
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.quantization import dequantize
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.step import Step, Tree


class AdapterStep(Step):
    """Gradients of the diffusion objective by the arrays of an adapter alone."""

    def __init__(self, base: Base, optimizer: optim.Optimizer, config: TrainConfig) -> None:
        assert config.adapter is not None
        super().__init__(base.loaded.transfusion, optimizer, config)
        self._base, self._spec = base, config.adapter
        self._image_only = self._spec.modality == "image"
        if self._image_only and len(self._model.config.sizes) > 1:
            raise UserError(
                'adapter.modality "image" is for models of one picture size: train an adapter of both modalities'
            )
        self._prefix = PAINTER if self._image_only else ""

    @property
    def uses_lanes(self) -> bool:
        """Not with an image-only adapter, whose gate is made for the whole batch."""
        return super().uses_lanes and not self._image_only

    def initial_weights(self) -> Tree:
        """The adapter's arrays."""
        return tree_unflatten(list(flat_trained(self._model, self._base.names).items()))

    def forward(self, batch: TrainArrays) -> tuple[mx.array, list[mx.array]]:
        """The model on packed rows, with an image-only adapter at the tokens of noisy pictures alone."""
        if not self._image_only:
            return self._model.predict(batch)
        gate, (m, n, _) = self._base.gate, batch.patches.shape
        noisy = batch.angle > 0
        gate.pictures = noisy[:, None, None]
        gate.tokens = batch.is_image & noisy[batch.patch_row // n][..., None] if m else batch.is_image
        try:
            return self._model.predict(batch)
        finally:
            gate.tokens = gate.pictures = None  # leave no tracers behind

    def save(
        self, folder: Path, model: Transfusion, tokenizer: Tokenizer, extra: Mapping[str, Any] | None
    ) -> object:
        """Write the adapter in `model` into a folder that `load` reads. Raises UserError."""
        return write_adapter(folder, self._arrays(model), self.adapter_config(folder))

    def read_averaged(self, folder: Path) -> Tree:
        """The arrays that `save` wrote, as the tree of what is trained."""
        arrays = read_safetensors(lora.adapter_file(folder))
        return tree_unflatten([(name.removeprefix(self._prefix), value) for name, value in arrays.items()])

    def paint_grid(self, tokenizer: Tokenizer, file: Path) -> None:
        """Paint the prompts of the config with the adapter in its base, as a user would."""
        from mlx_transfusion.training.preview import paint_grid

        assert self._config.init is not None
        base = load(self._config.init, dtype=mx.float32)
        dequantize(base.model, mx.float32)
        arrays = flat_trained(self._model, self._base.names)
        spec = lora.LoraParameters(self._spec.rank, self._spec.scale, tuple(self._base.names))
        config = dataclasses.replace(self.adapter_config(file.parent), lora_parameters=spec)
        model = with_adapters(base.model, [Adapter(config, arrays, image_only=self._image_only)])
        assert isinstance(model, Transfusion)
        paint_grid(model, tokenizer, self._config.sample, file)

    def adapter_config(self, folder: Path) -> lora.AdapterConfig:
        """What adapter_config.json in `folder` says."""
        assert self._config.init is not None
        keys = tuple(self._prefix + name for name in self._base.names)
        return lora.AdapterConfig(
            model=base_name(self._config.init, folder),
            lora_parameters=lora.LoraParameters(self._spec.rank, self._spec.scale, keys),
            model_fingerprint=self._base.loaded.fingerprint,
            fine_tune_type=self._spec.type,
            config={"painter": True} if self._image_only else {},
        )

    def _arrays(self, model: Transfusion) -> dict[str, mx.array]:
        flat = flat_trained(model, self._base.names)
        return {self._prefix + name: value for name, value in flat.items()}


def write_adapter(folder: Path, arrays: dict[str, mx.array], config: lora.AdapterConfig) -> Path:
    """Write an adapter into a folder (created when missing); returns it. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / lora.ADAPTER_FILE, arrays)
    write_json(folder / ADAPTER_CONFIG, config.to_dict())
    return folder
