"""The arguments of transfusion-pytorch's constructor (transfusion_pytorch.py) as a config of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig

CHOICES = frozenset({
    "num_text_tokens", "transformer", "dim_latent", "channel_first_latent", "add_pos_emb", "modality_default_shape",
    "modality_num_dim", "model_output_clean", "eps",
})  # fmt: skip
TRAINING = frozenset({
    "transfusion_pytorch_version", "modality_processing", "prob_uncond", "ignore_index", "flow_loss_weight",
    "text_loss_weight", "velocity_consistency_loss_weight", "reconstruction_loss_weight", "odeint_kwargs",
    "modality_encoder_decoder_requires_batch_dim", "fallback_to_default_shape_if_invalid", "modality_encoder",
    "modality_decoder",
})  # fmt: skip
"""Constructor arguments that do not change what the network computes."""
TRANSFORMER = frozenset({
    "dim", "depth", "dim_head", "heads", "ff_expansion_factor", "unet_skips", "use_value_residual", "qk_rmsnorm",
    "attn_laser", "attn_kwargs",
})  # fmt: skip
TRANSFORMER_TRAINING = frozenset({"dropout", "ff_kwargs", "use_flex_attn"})
ATTENTION = frozenset({"softcap_value", "gate_values", "laser_softclamp_value", "use_flex_attn", "dropout"})


def read_config(arguments: Mapping[str, Any], where: str) -> LucidrainsConfig:
    """Our config of the constructor's arguments. Raises UserError for missing, unknown and unsupported ones."""
    _check_keys(arguments, CHOICES | TRAINING, where)
    if arguments.get("pre_post_transformer_enc_dec") is not None:
        raise UserError(f"{where}: models with a U-Net around the transformer cannot be converted")
    transformer = arguments.get("transformer")
    if not isinstance(transformer, dict):
        raise UserError(f"{where}: transformer is {transformer!r}, expected an object of its arguments")
    _check_keys(transformer, TRANSFORMER | TRANSFORMER_TRAINING, f"{where}: transformer")
    attention = transformer.get("attn_kwargs") or {}
    _check_keys(attention, ATTENTION, f"{where}: attn_kwargs")
    try:
        dim = int(transformer["dim"])
        fields = {
            "num_text_tokens": arguments["num_text_tokens"],
            "dim": dim,
            "depth": transformer["depth"],
            "dim_head": transformer.get("dim_head", 64),
            "heads": transformer.get("heads", 8),
            "ff_inner": int(dim * float(transformer.get("ff_expansion_factor", 4)) * 2 / 3),
            "modalities": _modalities(arguments, dim),
            "unet_skips": transformer.get("unet_skips", True),
            "value_residual": transformer.get("use_value_residual", False),
            "qk_norm": transformer.get("qk_rmsnorm", True),
            "laser": transformer.get("attn_laser", False),
            "gates": attention.get("gate_values", True),
            "softcap": attention.get("softcap_value", 50.0),
            "laser_softcap": attention.get("laser_softclamp_value", 15.0),
            "clean_output": arguments.get("model_output_clean", False),
            "clean_eps": arguments.get("eps", 1e-2),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: not the arguments of transfusion-pytorch's constructor: {error!r}"
        ) from error
    return LucidrainsConfig.from_dict(fields, where)


def _check_keys(data: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    extra = sorted(set(data) - known - {"pre_post_transformer_enc_dec"})
    if extra:
        raise UserError(f"{where}: unknown argument {extra[0]!r} of transfusion-pytorch's constructor")


def _modalities(arguments: Mapping[str, Any], dim: int) -> list[dict[str, Any]]:
    """One table for each modality: an argument is one value for all, or a list of one for each."""
    latents = _each(arguments.get("dim_latent") or dim, None)
    count = len(latents)
    shapes = arguments.get("modality_default_shape")
    one = shapes is None or all(isinstance(n, int) for n in shapes)
    per_kind: list[Any] = [shapes] * count if one else [*(shapes or ())]
    axes = arguments.get("modality_num_dim")
    lengths = (
        [None if shape is None else len(shape) for shape in per_kind] if axes is None else _each(axes, count)
    )
    return [
        {
            "dim_latent": latent,
            "channel_first": first,
            "axial_positions": bool(axial),
            "axes": n,
            "shape": shape,
        }
        for latent, first, axial, n, shape in zip(
            latents,
            _each(arguments.get("channel_first_latent", False), count),
            _each(arguments.get("add_pos_emb", False), count),
            lengths,
            per_kind,
            strict=True,
        )
    ]


def _each(value: Any, count: int | None) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * (count or 1)
