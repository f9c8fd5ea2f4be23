"""The frozen model under an adapter, ready for training."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune.layers import Gate, insert
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.model_path import is_adapter
from mlx_transfusion.objective import read_objective
from mlx_transfusion.quantization import quantize
from mlx_transfusion.training.config import TrainConfig

GROUPS = (64, 32)
"""Group sizes of a quantised base, the first that divides its width."""


@dataclass(frozen=True)
class Base:
    """A frozen model with adapters in it."""

    loaded: Loaded
    names: list[str]
    """The linear layers that have an adapter."""
    gate: Gate


def load_base(config: TrainConfig) -> Base:
    """The model `init` of a run with an [adapter] table, quantised when that asks for it, with adapters in it.

    Raises UserError for a model that cannot be trained on: a consistency model, one with a painter, another adapter,
    and one of a family that this package does not train.
    """
    spec = config.adapter
    assert spec is not None
    assert config.init is not None
    loaded = load(config.init, dtype=mx.bfloat16 if config.dtype == "bfloat16" else mx.float32)
    model = loaded.transfusion
    if is_adapter(loaded.path) or read_objective(loaded.extra, loaded.name).consistency:
        raise UserError(
            f"model {loaded.name} is a student or an adapter: fine-tune the diffusion model it came from "
            "(the adapter then works on the student too), or fuse it first"
        )
    if model.config.painter:
        raise UserError(f"model {loaded.name} has a painter already: fine-tune the model without it")
    if spec.quantize is not None:
        width = model.config.hidden_size
        group = next((size for size in GROUPS if width % size == 0), None)
        if group is None:
            raise UserError(
                f"model {loaded.name}: its width {width} does not divide into groups of {GROUPS[-1]}: "
                "leave out the quantisation"
            )
        quantize(model, spec.quantize, group)
    gate = Gate()
    names = insert(model, spec, config.seed, gate)
    mx.eval(model.parameters())
    return Base(loaded, names, gate)
