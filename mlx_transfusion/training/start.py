"""What a run starts from: its model, its teacher, the base of an adapter, the autoencoder of its latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import Loaded as ModelFolder
from mlx_transfusion.model_io import load, load_config
from mlx_transfusion.model_path import AUTOENCODER
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.models.transfusion import Coder, Transfusion, with_painter
from mlx_transfusion.objective import read_objective
from mlx_transfusion.quantization import dequantize
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.discrete_step import new_discrete
from mlx_transfusion.training.shape import run_shape
from mlx_transfusion.training.shard_set import ShardSet

if TYPE_CHECKING:
    from mlx_transfusion.finetune.base import Base
    from mlx_transfusion.finetune.family_run import FamilyRun


def family_of(config: TrainConfig) -> FamilyRun | None:
    """The converted model that a run starts from, and what of it is trained."""
    from mlx_transfusion.finetune.family_run import family_run  # late: fine-tuning stands above training

    return family_run(config)


def base_of(config: TrainConfig) -> Base | None:
    """The model that an adapter is trained on, with the adapter's layers in it."""
    if config.adapter is None:
        return None
    if config.consistency is not None:
        raise UserError(
            "training config: [adapter] beside [consistency] is for converted models; of our own family give "
            'consistency.student "painter", or extract an adapter from a student (lora extract)'
        )
    from mlx_transfusion.finetune.base import load_base  # late: fine-tuning stands above training

    return load_base(config)


def new_model(config: TrainConfig, tokenizer: Tokenizer, start: str | None) -> Transfusion | Discrete:
    """Random weights from the seed, or those of the model `start`, which must be of the same shape."""
    if config.model is not None:
        shape = run_shape(config, tokenizer)
        if isinstance(shape, DiscreteConfig):
            return new_discrete(config, shape, start)
    else:
        assert config.start is not None  # checked by TrainConfig
        shape = load_config(config.start)
        if config.consistency is not None:
            own = config.consistency.student == "painter"
            shape = dataclasses.replace(shape, prediction="velocity", painter=own)
    _check_consistency(config, shape)
    if config.consistency is not None and config.consistency.guidance_range is not None:
        shape = dataclasses.replace(shape, guidance_condition=True)
    mx.random.seed(config.seed)
    model = Transfusion(shape)
    if start is not None:
        begin = load(start, dtype=mx.float32).transfusion  # stored in half precision or few bits perhaps
        dequantize(begin, mx.float32)
        theirs, ours = begin.config.to_dict(), shape.to_dict()
        # A student predicts the velocity whatever its teacher predicts; the rest of the weights still serve.
        free = {"prediction", "painter"} if config.consistency is not None else set()
        if not begin.config.guidance_condition:
            free.add("guidance_condition")  # a layer that starts at zero
        if differs := [key for key in ours if theirs[key] != ours[key] and key not in free]:
            raise UserError(
                f"init {start}: its {differs[0]} is {theirs[differs[0]]}, [model] of this run says "
                f"{ours[differs[0]]}"
            )
        if begin.config.painter and not shape.painter:
            raise UserError(
                f'init {start}: has a painter; give consistency.student "painter" or another init'
            )
        if shape.painter and not begin.config.painter:
            begin = with_painter(begin)
        model.update(begin.parameters())
    mx.eval(model.parameters())
    return model


def _check_consistency(config: TrainConfig, shape: ModelConfig) -> None:
    if config.consistency is not None and shape.prediction != "velocity":
        raise UserError(
            f'[model]: prediction is "{shape.prediction}"; a consistency model predicts the "velocity": change it'
        )
    if shape.guidance_condition and (config.consistency is None or config.consistency.guidance_range is None):
        raise UserError(
            "[model]: guidance_condition is for a student of several guidance scales: distil with "
            "consistency.guidance_range, or leave it out"
        )


def teacher_of(config: TrainConfig, shape: ModelConfig) -> ModelFolder | None:
    """The diffusion model to distil. Raises UserError when it does not speak the student's language."""
    if config.consistency is None or config.consistency.teacher is None:
        return None
    teacher = load(config.consistency.teacher, dtype=mx.float32)
    if read_objective(teacher.extra, teacher.name).consistency:
        raise UserError(
            f"teacher {teacher.name}: is a consistency model itself; distil the diffusion model it came from"
        )
    free = {"prediction", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "qk_norm", "patch_positions",
            "patch_skip", "time_frequencies", "max_position", "painter", "guidance_condition",
            "patch_encoder", "unet_channels", "unet_blocks"}  # fmt: skip
    theirs, ours = teacher.config.to_dict(), shape.to_dict()
    if differs := [key for key in ours if theirs[key] != ours[key] and key not in free]:
        raise UserError(
            f"teacher {teacher.name}: its {differs[0]} is {theirs[differs[0]]}, the student's {ours[differs[0]]}; "
            "a teacher needs the same pictures and the same tokens"
        )
    return teacher


def attach_autoencoder(model: Transfusion | Discrete, config: TrainConfig, data: DataSet | ShardSet) -> None:
    """Give a model of latents or codes the autoencoder that made them. Raises UserError for another and for none."""
    folder = config.data.autoencoder
    if data.latents_of is None or folder is None:
        if data.latents_of is not None and config.sample.every:
            raise UserError("sample.every needs data.autoencoder, which turns latents or codes into pictures")
        return
    from mlx_transfusion.autoencoder.folder import load_autoencoder

    found = load_autoencoder(folder)
    if found.fingerprint != data.latents_of:
        raise UserError(
            f"{data.name_of_latents}: stale: made by autoencoder {data.latents_of}, and {folder} has the "
            f"fingerprint {found.fingerprint}: encode the data set again"
        )
    if isinstance(model, Discrete):
        model.attach(found.codes, Path(folder))
    else:
        model.coder = Coder(found.latents, Path(folder), found.preview)


def check_latents(data: DataSet | ShardSet, checkpoint: Path) -> None:
    """Raises UserError when a run that is resumed was trained on the latents of another autoencoder."""
    folder = checkpoint / AUTOENCODER
    if data.latents_of is None or not folder.is_dir():
        return
    from mlx_transfusion.autoencoder.folder import load_autoencoder

    then = load_autoencoder(folder).fingerprint
    if then != data.latents_of:
        raise UserError(
            f"{checkpoint}: was trained on latents of autoencoder {then}, these are of {data.latents_of}: use the "
            "same latents or another output folder"
        )
