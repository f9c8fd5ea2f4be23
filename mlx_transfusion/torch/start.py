"""What a run begins with: its model's shape and weights, and the record that tells one run from another."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import resolve
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.torch import folder
from mlx_transfusion.torch.initial import initialise
from mlx_transfusion.torch.model import Transfusion
from mlx_transfusion.torch.parallel import World, build_sharded
from mlx_transfusion.training.config import TrainConfig, model_config

MODEL = "model_config"
"""Where the record of a checkpoint keeps the model's own fields beside those of the training config."""


def new_model(
    config: TrainConfig, tokenizer: Tokenizer, mesh: DeviceMesh, world: World, reshard: bool
) -> Transfusion:
    """A sharded model with first weights from the seed, or with those of `init` or of the teacher.

    Raises UserError when the model to start from has another shape, or is of another kind.
    """
    shape = model_shape(config, tokenizer)
    model = build_sharded(shape, mesh, config.dtype, world.device, reshard)
    initialise(model, shape, config.seed)
    if config.start is not None:
        path = resolve(config.start)
        free = {"prediction", "guidance_condition"} if config.consistency is not None else set()
        theirs = folder.read_config(path)[0]
        differs = [k for k, v in shape.to_dict().items() if theirs.to_dict()[k] != v and k not in free]
        if differs:
            raise UserError(
                f"init {config.start}: its {differs[0]} is {getattr(theirs, differs[0])}, [model] of this run says "
                f"{getattr(shape, differs[0])}"
            )
        folder.fill(model, path, optional=("angle_embedding.guidance.",))
    return model


def model_shape(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's config: of [model] and the tokenizer, or of the model that training starts from."""
    special = {
        f"{name}_token_id": getattr(tokenizer.special, name)
        for name in ("pad", "bos", "eos", "unk", "boi", "eoi")
    }
    if config.model is not None:
        shape = model_config(config, tokenizer.vocab_size, special)
    else:
        assert config.start is not None  # checked by TrainConfig
        shape = folder.read_config(resolve(config.start))[0]
        if config.consistency is not None:
            shape = dataclasses.replace(shape, prediction="velocity")
    if config.consistency is None:
        return shape
    if shape.prediction != "velocity":
        raise UserError('[model]: a consistency model predicts the "velocity": change prediction')
    return dataclasses.replace(shape, guidance_condition=config.consistency.guidance_range is not None)


def run_config(config: TrainConfig, shape: ModelConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its run; extra: tables for the config.json of an export."""
    return {"training": config.to_dict(), MODEL: shape.to_dict(), "extra": extra}
