"""MonoFormer (MonoFormer/MonoFormer_ImageNet_256 and its kin): Llama's names, and a few layers of DiT.

The official training script writes its own keys into a Llama config.json. The four added tokens follow one another,
in the order pad, image, begin, end, so the image's id tells the others. The autoencoder is Stable Diffusion's and
lies elsewhere: --autoencoder.
"""

from __future__ import annotations

import dataclasses

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.clip_vision import ClipVisionConfig
from mlx_transfusion.models.monoformer_config import MonoFormerConfig

from .clip import layer_entries, picture_entries
from .coder import CODER, open_coder
from .monoformer_config import read_config
from .sources import Source
from .table import (
    HIGH,
    LOW,
    WHOLE,
    Card,
    Converter,
    Entry,
    Plan,
    Precision,
    linear,
    norm,
    reorder_columns,
    unused,
    vector,
)
from .tokenizer_marks import completed

MARKS = frozenset(
    {"t_embedder.mlp.0.weight", "t_projector.0.weight", "final_layer.adaLN_modulation.1.weight"}
)
MARKS_OF_TEXT = ("<|pad|>", "<|image|>", "<|im_start|>", "<|im_end|>")
"""Behind TinyLlama's tokens, for a tokenizer without them."""
TOWER = "vision_encoder.vision_tower.vision_model"
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
    last = config.num_hidden_layers - 1
    table = picture_entries(config, TOWER, "vision", last)
    behind = layer_entries(config, f"{TOWER}.encoder.layers.{last}", "")
    behind += norm(f"{TOWER}.post_layernorm", "", config.hidden_size, bias=True)
    reason = "behind the features: the model reads those before CLIP's last layer"
    return table + [unused(entry.source, entry.shape, reason) for entry in behind]


def detect(source: Source) -> bool:
    """By the architecture's name, or by the layers that a Llama does not have."""
    return "MonoFormerForCausalLM" in (source.json().get("architectures") or ()) or source.names() >= MARKS


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for a config that our model file does not know."""
    coder = open_coder(source)
    if coder is None:
        raise UserError(
            "MonoFormer paints with an autoencoder that its folder does not hold: name it with --autoencoder "
            "(stabilityai/sd-vae-ft-mse, a hub id or a folder)"
        )
    config = dataclasses.replace(read_config(source), autoencoder=coder.config)
    card = Card(
        "MonoFormer/MonoFormer_ImageNet_256", "unknown", "No licence was published with the official code.",
        url="https://github.com/MonoFormer/MonoFormer", notes=NOTES,
    )  # fmt: skip
    parts = {"": source.open(), CODER: coder.checkpoint}
    table = (*entries(config), *coder.entries)
    files = completed(source.tokenizer_files(), config.pad_token_id, MARKS_OF_TEXT)
    return Plan("monoformer", config.to_dict(), parts, table, files, card, precision)


def precision(path: str) -> Precision:
    """Llama's layers and CLIP's low, embedding and head high, what every painted number passes whole."""
    if path.startswith(("layers.", "vision.layers.")):
        return LOW
    return HIGH if path in ("embed_tokens", "lm_head") else WHOLE


CONVERTER = Converter("monoformer", "MonoFormer (ImageNet 256, with or without CLIP)", detect, plan)
