"""CLIP as transformers stores OpenAI's ViTs, for `evaluate`; and its tower, for other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.clip import Clip, ClipConfig, ClipTextConfig
from mlx_transfusion.models.clip_vision import ClipVisionConfig
from mlx_transfusion.models.vision_layers import SquareVisionConfig, VisionConfig

from .sources import Source
from .table import WHOLE, Card, Converter, Entry, Plan, linear, norm, patch_matrix, unused, vector

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MARKS = frozenset({"visual_projection.weight", "text_projection.weight", "vision_model.pre_layrnorm.weight"})
NUMBERS = "the numbers 0, 1, 2, ..."
VISION, TEXT = "vision_model", "text_model"


def layer_entries(config: VisionConfig | SquareVisionConfig, source: str, target: str) -> list[Entry]:
    """One layer of either tower."""
    d, f = config.hidden_size, config.intermediate_size
    sizes = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    table = [
        entry
        for name, (out, width) in sizes.items()
        for entry in linear(f"{source}.{name}", f"{target}.{name}", out, width)
    ]
    for name in ("layer_norm1", "layer_norm2"):
        table += norm(f"{source}.{name}", f"{target}.{name}", d, bias=True)
    return table


def picture_entries(config: ClipVisionConfig, tower: str, target: str, layers: int) -> list[Entry]:
    """The vision tower up to its first `layers` layers."""
    d, patches, embed = config.hidden_size, config.patches, f"{tower}.embeddings"
    table = [
        vector(f"{embed}.class_embedding", f"{target}.class_embedding", d),
        Entry(f"{embed}.patch_embedding.weight", f"{target}.patch_embedding.weight",
              (d, 3, config.patch_size, config.patch_size), patch_matrix(d, 3, config.patch_size)),
        Entry(f"{embed}.position_embedding.weight", f"{target}.position_embedding.weight", (patches + 1, d)),
        unused(f"{embed}.position_ids", (1, patches + 1), NUMBERS, optional=True),
        *norm(f"{tower}.pre_layrnorm", f"{target}.pre_layernorm", d, bias=True),
    ]  # fmt: skip
    for i in range(layers):
        table += layer_entries(config, f"{tower}.encoder.layers.{i}", f"{target}.layers.{i}")
    return table


def entries(config: ClipConfig) -> list[Entry]:
    """The table of names and shapes of a checkpoint."""
    text, p, embed = config.text, config.projection_dim, f"{TEXT}.embeddings"
    d, t = text.hidden_size, text.max_position_embeddings
    table = picture_entries(config.vision, VISION, "vision", config.vision.num_hidden_layers)
    table += norm(f"{VISION}.post_layernorm", "post_layernorm", config.vision.hidden_size, bias=True)
    table += linear("visual_projection", "visual_projection", p, config.vision.hidden_size, bias=False)
    table += [
        Entry(f"{embed}.token_embedding.weight", "text.token_embedding.weight", (text.vocab_size, d)),
        Entry(f"{embed}.position_embedding.weight", "text.position_embedding.weight", (t, d)),
        unused(f"{embed}.position_ids", (1, t), NUMBERS, optional=True),
    ]
    for i in range(text.num_hidden_layers):
        table += layer_entries(text, f"{TEXT}.encoder.layers.{i}", f"text.layers.{i}")
    table += norm(f"{TEXT}.final_layer_norm", "text.final_layer_norm", d, bias=True)
    table += linear("text_projection", "text_projection", p, d, bias=False)
    return [*table, unused("logit_scale", (), "only training needs it", optional=True)]


def read_vision(data: dict[str, Any], said: dict[str, Any], file: Path) -> ClipVisionConfig:
    """The vision tower of transformers' config. said: preprocessor_config.json, {} without one. Raises UserError."""
    fields = _sizes(data, ("image_size", "patch_size", *SIZES), file)
    fields |= {key: said[key] for key in ("image_mean", "image_std") if key in said}
    return from_dict(ClipVisionConfig, fields, str(file))


def _sizes(data: dict[str, Any], keys: tuple[str, ...], file: Path) -> dict[str, Any]:
    """Those whole numbers of one tower, and its epsilon."""
    if data.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(f'{file}: hidden_act is {data["hidden_act"]!r}, expected "quick_gelu"')
    for key in keys:
        if not isinstance(data.get(key), int) or isinstance(data[key], bool):
            raise UserError(f"{file}: {key} is {data.get(key)!r}, expected a whole number")
    return {key: data[key] for key in (*keys, "layer_norm_eps") if key in data}


def read_config(source: Source) -> ClipConfig:
    """Of config.json and preprocessor_config.json. Raises UserError for what is missing or of another form."""
    file, data = source.folder / "config.json", source.json()
    towers = [data.get(name) for name in ("vision_config", "text_config")]
    if not all(isinstance(tower, dict) for tower in towers):
        raise UserError(
            f"{file}: no vision_config and text_config: put CLIP's config.json beside its weights"
        )
    # Older files hold only what differs from the sizes of ViT-B/32.
    vision = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "intermediate_size": 3072} | (towers[0] or {})  # fmt: skip
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
            "num_attention_heads": 8, "intermediate_size": 2048} | (towers[1] or {})  # fmt: skip
    keys = ("vocab_size", "max_position_embeddings", *SIZES)
    return ClipConfig(
        read_vision(vision, source.json("preprocessor_config.json"), file),
        from_dict(ClipTextConfig, _sizes(text, keys, file), str(file)),
        data.get("projection_dim", 512),
    )


def detect(source: Source) -> bool:
    """By config.json's model_type and the projections, which a tower alone does not have."""
    return source.json().get("model_type") == "clip" and source.names() >= MARKS


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for a config that is not OpenAI's, and without a tokenizer.json."""
    config = read_config(source)
    files = source.tokenizer_files()
    if "tokenizer.json" not in files:
        raise UserError(f"{source.folder}: no tokenizer.json: captions are read with CLIP's own tokenizer")
    return Plan(
        "clip",
        config.to_dict(),
        {"": source.open()},
        tuple(entries(config)),
        {"tokenizer.json": files["tokenizer.json"]},
        Card(
            source.name or source.folder.name,
            "unknown",
            "See the original's page.",
            pipeline="zero-shot-image-classification",
        ),
        lambda path: WHOLE,
        model=Clip(config),
    )


CONVERTER = Converter("clip", "CLIP (OpenAI's ViTs), for evaluate", detect, plan)
