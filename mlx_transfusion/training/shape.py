"""What a run trains and on which rows, told before there is a model: for the trainer, and to count its operations."""

from __future__ import annotations

from typing import Any

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.flops import step_flops, work_of
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig, discrete_config, model_config
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.discrete_data import CodeData

COUNTED_STEPS = 32
"""Steps whose operations make the mean of a run."""


def run_shape(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig | DiscreteConfig:
    """The config of the model that [model] describes. Raises UserError for bad keys."""
    special = {
        f"{name}_token_id": getattr(tokenizer.special, name)
        for name in ("pad", "bos", "eos", "unk", "boi", "eoi")
    }
    arguments = (config, tokenizer.vocab_size, special)
    return discrete_config(*arguments) or model_config(*arguments)


def data_arguments(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What every kind of training data is told of a run."""
    return {
        "data": config.data,
        "diffusion": config.diffusion,
        "tokenizer": tokenizer,
        "seed": config.seed,
        "sequence_length": config.sequence_length,
    }


def run_data(config: TrainConfig, model: ModelConfig | DiscreteConfig, tokenizer: Tokenizer) -> DataSet:
    """The training rows of a run from nothing. Raises UserError for bad files and rows."""
    shared = data_arguments(config, tokenizer)
    if isinstance(model, DiscreteConfig):
        return CodeData(config.data.train, model=model, **shared)
    return DataSet(config.data.train, model=model, **shared)


def mean_step_flops(config: TrainConfig, steps: int = COUNTED_STEPS) -> float:
    """Operations of a mean step of a run of either kind, from its rows: what is padding or masked does not count.

    So runs of a diffusion model and of a discrete one on the same rows compare. Raises UserError for a bad config and
    for bad files and rows.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    model = run_shape(config, tokenizer)
    data = run_data(config, model, tokenizer)
    total = 0.0
    for step in range(steps):
        documents = data.documents(step, config.batch_size)
        total += step_flops(model, work_of(data.pack(documents), bidirectional=model.bidirectional))
    return total / steps
