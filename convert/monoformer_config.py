"""MonoFormer's config.json, and CLIP's beside it (monoformer.py), as a config of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.clip_vision import ClipVisionConfig
from mlx_transfusion.models.monoformer_config import MonoFormerConfig

from .clip import read_vision
from .sources import Source

FIXED: dict[str, tuple[Any, ...]] = {
    "decoder_t_embed": ("add_before_image_tokens",),
    "use_adaln_final_layer": (True,),
    "add_pos_embed_each_layer": (False, None),
    "use_hybrid_attn_mask": (False, None),
    "learn_sigma": (True,),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
    "hidden_act": ("silu", None),
}
"""What the model file knows, of the official code's choices. None: the key is missing."""
VAE_FACTOR = 8
"""Pixels of a picture for one of its latent."""


def read_config(source: Source) -> MonoFormerConfig:
    """Our config of a foreign folder. Raises UserError for what our model file does not know and for missing keys."""
    file, data = source.folder / "config.json", source.json()
    for key, known in FIXED.items():
        if data.get(key) not in known:
            raise UserError(f"{file}: {key} is {data.get(key)!r}, and only {known[0]!r} can be converted")
    tensors = source.open().tensors
    embedding = tensors.get("model.embed_tokens.weight")
    words = _number(data, "vocab_size", file) if embedding is None else embedding.shape[0]
    # Pad, image, begin and end are the last tokens of the official tokenizer.
    image = words - 3 if data.get("image_token_index") is None else _number(data, "image_token_index", file)
    fields: dict[str, Any] = {
        name: data[name] for name in ("rms_norm_eps", "rope_theta", "max_position_embeddings") if name in data
    }
    size = _number(data, "image_size", file)
    heads, vision = _number(data, "num_attention_heads", file), _read_vision(source, data)
    fields |= {
        "vocab_size": words,
        "hidden_size": _number(data, "hidden_size", file),
        "num_hidden_layers": _number(data, "num_hidden_layers", file),
        "num_attention_heads": heads,
        "num_key_value_heads": data.get("num_key_value_heads") or heads,
        "intermediate_size": _number(data, "intermediate_size", file),
        "bos_token_id": _number(data, "bos_token_id", file),
        "eos_token_id": _number(data, "eos_token_id", file),
        "pad_token_id": image - 1,
        "image_token_id": image,
        "boi_token_id": image + 1,
        "eoi_token_id": image + 2,
        "latent_size": size // VAE_FACTOR,
        "latent_channels": _number(data, "in_channels", file),
        "patch_size": _number(data, "patch_size", file),
        "position_sines": bool(data.get("use_pos_embed", True)),
        "picture_attention": bool(data.get("use_bi_attn_img_tokens", True)),
        "vision": None if vision is None else dataclasses.asdict(vision),
    }
    return MonoFormerConfig.from_dict(fields, str(file))


def _number(data: dict[str, Any], key: str, file: Path) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{file}: {key} is {value!r}, expected a whole number")
    return value


def _read_vision(source: Source, data: dict[str, Any]) -> ClipVisionConfig | None:
    """CLIP's sizes, from the folder that the config names, inside SOURCE."""
    if data.get("vision_encoder") is None:
        return None
    file, folder = source.folder / "config.json", str(data.get("vision_encoder_path") or "")
    if data["vision_encoder"] != "clip":
        raise UserError(
            f'{file}: vision_encoder is {data["vision_encoder"]!r}, and only "clip" can be converted'
        )
    name = next((n for n in (f"{folder}/config.json", "clip/config.json") if source.has(n)), None)
    if name is None:
        raise UserError(f"{file}: the sizes of CLIP are missing: put its folder into {source.folder} as clip")
    clip = source.json(name)
    clip = clip.get("vision_config", clip)
    said = source.json(str(Path(name).with_name("preprocessor_config.json")))
    return read_vision(clip, said, source.folder / name)
