"""MonoFormer (MonoFormer/MonoFormer_ImageNet_256 and its kin): Llama's names, and a few layers of DiT.

The official training script writes its own keys into a Llama config.json. The four added tokens follow one another,
in the order pad, image, begin, end, so the image's id tells the others. The autoencoder is Stable Diffusion's and
lies elsewhere: --autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.clip_vision import ClipVisionConfig
from mlx_transfusion.models.monoformer_config import MonoFormerConfig

from .sources import Source
from .table import (
    Card,
    Converter,
    Entry,
    Plan,
    linear,
    norm,
    patch_matrix,
    reorder_columns,
    unused,
    vector,
)

MARKS = frozenset(
    {"t_embedder.mlp.0.weight", "t_projector.0.weight", "final_layer.adaLN_modulation.1.weight"}
)
TOWER = "vision_encoder.vision_tower.vision_model"
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
NOTES = (
    'A prompt is what the picture shows: the model reads "Please generate an image of PROMPT.", as in training. '
    "The samplers use its noise prediction; the official sampler with the learned variance is in Python only."
)


def entries(config: MonoFormerConfig) -> list[Entry]:
    """The table of names and shapes of a checkpoint."""
    d, v, p = config.hidden_size, config.vocab_size, config.patch_size
    turned = reorder_columns(d, (config.latent_channels, p, p), (1, 2, 0))
    table = [
        Entry("model.embed_tokens.weight", "embed_tokens.weight", (v, d)),
        Entry("lm_head.weight", "lm_head.weight", (v, d)),
        *norm("model.norm", "norm", d),
        *linear("t_embedder.mlp.0", "t_embedder.fc1", d, 256),
        *linear("t_embedder.mlp.2", "t_embedder.fc2", d, d),
        *linear("t_projector.0", "t_projector.fc1", d, d),
        *linear("t_projector.2", "t_projector.fc2", d, d),
        Entry("x_embedder.weight", "x_embedder.weight", (d, config.patch_dim), turned),
        vector("x_embedder.bias", "x_embedder.bias", d),
        *linear("final_layer.linear", "final_layer.linear", 2 * config.patch_dim, d),
        *linear("final_layer.adaLN_modulation.1", "final_layer.modulation", 2 * d, d),
        unused("pos_embed", (1, config.grid**2, d), "fixed sines, computed from the config", optional=True),
    ]
    for i in range(config.num_hidden_layers):
        table += _layer(config, f"model.layers.{i}", f"layers.{i}")
    if config.vision is not None:
        table += vision_entries(config.vision)
        table += linear("im_embedder.0", "im_embedder.fc1", d, config.vision.hidden_size)
        table += linear("im_embedder.2", "im_embedder.fc2", d, d)
    return table


def _layer(config: MonoFormerConfig, source: str, target: str) -> list[Entry]:
    d, f, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    sizes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    table = [
        entry
        for name, (out, width) in sizes.items()
        for entry in linear(f"{source}.{name}", f"{target}.{name}", out, width, bias=False)
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        table += norm(f"{source}.{name}", f"{target}.{name}", d)
    buffer = f"{source}.self_attn.rotary_emb.inv_freq"
    return [*table, unused(buffer, (config.head_dim // 2,), "computed from the config", optional=True)]


def vision_entries(config: ClipVisionConfig) -> list[Entry]:
    """The table of CLIP's tower inside a checkpoint."""
    d, patches = config.hidden_size, config.patches
    embed = f"{TOWER}.embeddings"
    table = [
        vector(f"{embed}.class_embedding", "vision.class_embedding", d),
        Entry(f"{embed}.patch_embedding.weight", "vision.patch_embedding.weight",
              (d, 3, config.patch_size, config.patch_size), patch_matrix(d, 3, config.patch_size)),
        Entry(f"{embed}.position_embedding.weight", "vision.position_embedding.weight", (patches + 1, d)),
        unused(f"{embed}.position_ids", (1, patches + 1), "the numbers 0, 1, 2, ...", optional=True),
        *norm(f"{TOWER}.pre_layrnorm", "vision.pre_layernorm", d, bias=True),
    ]  # fmt: skip
    last = config.num_hidden_layers - 1
    for i in range(last):
        table += _clip_layer(config, f"{TOWER}.encoder.layers.{i}", f"vision.layers.{i}")
    behind = _clip_layer(config, f"{TOWER}.encoder.layers.{last}", "")
    behind += norm(f"{TOWER}.post_layernorm", "", d, bias=True)
    reason = "behind the features: the model reads those before CLIP's last layer"
    return table + [unused(entry.source, entry.shape, reason) for entry in behind]


def _clip_layer(config: ClipVisionConfig, source: str, target: str) -> list[Entry]:
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


def read_config(source: Source) -> MonoFormerConfig:
    """Our config of a foreign folder. Raises UserError for what our model file does not know and for missing keys."""
    file, data = source.folder / "config.json", source.json()
    for key, known in FIXED.items():
        if data.get(key) not in known:
            raise UserError(f"{file}: {key} is {data.get(key)!r}, and only {known[0]!r} can be converted")
    image = _number(data, "image_token_index", file)
    tensors = source.open().tensors
    words = tensors["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in tensors else 0
    fields = {
        name: data[name] for name in ("rms_norm_eps", "rope_theta", "max_position_embeddings") if name in data
    }
    size = _number(data, "image_size", file)
    heads = _number(data, "num_attention_heads", file)
    return MonoFormerConfig(
        vocab_size=words or _number(data, "vocab_size", file),
        hidden_size=_number(data, "hidden_size", file),
        num_hidden_layers=_number(data, "num_hidden_layers", file),
        num_attention_heads=heads,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        intermediate_size=_number(data, "intermediate_size", file),
        bos_token_id=_number(data, "bos_token_id", file),
        eos_token_id=_number(data, "eos_token_id", file),
        pad_token_id=image - 1,
        image_token_id=image,
        boi_token_id=image + 1,
        eoi_token_id=image + 2,
        latent_size=size // VAE_FACTOR,
        latent_channels=_number(data, "in_channels", file),
        patch_size=_number(data, "patch_size", file),
        position_sines=bool(data.get("use_pos_embed", True)),
        picture_attention=bool(data.get("use_bi_attn_img_tokens", True)),
        vision=_read_vision(source, data),
        **fields,
    )


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
    if clip.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(
            f'{source.folder / name}: hidden_act is {clip["hidden_act"]!r}, expected "quick_gelu"'
        )
    keys = (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    fields = {key: _number(clip, key, source.folder / name) for key in keys}
    fields |= {"layer_norm_eps": clip["layer_norm_eps"]} if "layer_norm_eps" in clip else {}
    said = source.json(str(Path(name).with_name("preprocessor_config.json")))
    fields |= {key: said[key] for key in ("image_mean", "image_std") if key in said}
    return from_dict(ClipVisionConfig, fields, str(source.folder / name))


def detect(source: Source) -> bool:
    """By the architecture's name, or by the layers that a Llama does not have."""
    return "MonoFormerForCausalLM" in (source.json().get("architectures") or ()) or source.names() >= MARKS


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for a config that our model file does not know."""
    config = read_config(source)
    card = Card(
        "MonoFormer/MonoFormer_ImageNet_256", "unknown", "No licence was published with the official code.",
        url="https://github.com/MonoFormer/MonoFormer", notes=NOTES,
    )  # fmt: skip
    parts = {"": source.open()}
    return Plan("monoformer", config.to_dict(), parts, tuple(entries(config)), source.tokenizer_files(), card)


CONVERTER = Converter("monoformer", "MonoFormer (ImageNet 256, with or without CLIP)", detect, plan)
