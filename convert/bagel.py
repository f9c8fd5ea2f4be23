"""BAGEL (ByteDance-Seed/BAGEL-7B-MoT): the language model with both experts, its vision transformer, and the FLUX
autoencoder beside it."""

from __future__ import annotations

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE

from . import autoencoder
from .bagel_config import read_config
from .hub import locate
from .sources import Source
from .table import HIGH, LOW, WHOLE, Card, Converter, Entry, Plan, Precision, linear, norm

EXPERTS = {"understand": "", "generate": "_moe_gen"}
"""Our two experts of a layer -> the suffix of their official names."""
VIT = "vit_model.vision_model"
WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
CODER = "autoencoder."
"""In front of the autoencoder's names, in the plan and in our model."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>' }}{%- endif -%}"
)
"""A message is a block of text without a word about who speaks; the tokenizer's own template is Qwen's."""
GENERATION = {"sampler": "ddim", "spacing": "shifted", "steps": 49, "guidance": 4.0}
"""The official program's Euler steps and scale."""
CARD = Card(
    "ByteDance-Seed/BAGEL-7B-MoT", "apache-2.0", url="https://github.com/ByteDance-Seed/Bagel",
    notes="It paints with the official sampler and its renormalised guidance. `describe --question` asks about a "
    "picture, `edit` changes one. Sizes of pictures stand in config.json: image_height and image_width up to 1024, "
    "multiples of 16; input_height and input_width up to 980, multiples of 14.",
)  # fmt: skip


def detect(source: Source) -> bool:
    """By the two files of sizes, or by the generation expert's names."""
    if source.has("llm_config.json") and source.has("vit_config.json"):
        return True
    return "language_model.model.norm_moe_gen.weight" in source.names()


def plan(source: Source) -> Plan:
    """The conversion of an official folder. Raises UserError for missing files and keys, and for unknown options."""
    config = read_config(source)
    if not source.has(AUTOENCODER) and source.autoencoder is None:
        raise UserError(
            f"{source.folder}: holds no {AUTOENCODER}: name the FLUX autoencoder with --autoencoder"
        )
    files = source.tokenizer_files()
    if HUGGINGFACE_FILE in files:
        files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    place = locate(str(source.autoencoder)).absolute() if source.autoencoder else AUTOENCODER
    coder = source.open(place)
    latents = autoencoder.read_checkpoint(coder, config.autoencoder)
    return Plan(
        family="bagel",
        config=config.to_dict(),
        parts={"": source.open(WEIGHTS if source.has(WEIGHTS) else ""), CODER: coder},
        entries=(*entries(config), *(e.under(CODER, CODER) for e in latents)),
        files=files,
        card=CARD,
        precision=precision,
        extra={"generation": GENERATION},
    )


def precision(path: str) -> Precision:
    """Both experts and the vision transformer low; time, latents, connector and autoencoder whole."""
    if path in ("embed_tokens", "lm_head"):
        return HIGH
    return LOW if path.startswith(("decoder.layers.", "vision.layers.")) else WHOLE


def entries(config: BagelConfig) -> list[Entry]:
    """Every tensor of ema.safetensors of this config."""
    d, p = config.text.hidden_size, config.latent_numbers
    words = (config.vocab_size, d)
    return [
        Entry("language_model.model.embed_tokens.weight", "embed_tokens.weight", words),
        Entry("language_model.lm_head.weight", "lm_head.weight", words),
        *norm("language_model.model.norm", "decoder.norm", d),
        *norm("language_model.model.norm_moe_gen", "decoder.norm_generate", d),
        *(e for i in range(config.text.num_hidden_layers) for e in decoder_entries(config, i)),
        *vision_entries(config),
        *linear("connector.fc1", "connector.fc1", d, config.vision.hidden_size),
        *linear("connector.fc2", "connector.fc2", d, d),
        Entry("vit_pos_embed.pos_embed", "vision_positions", (config.vision_table_side**2, d)),
        *linear("time_embedder.mlp.0", "time_embedder.fc1", d, 256),
        *linear("time_embedder.mlp.2", "time_embedder.fc2", d, d),
        *linear("vae2llm", "vae2llm", d, p),
        Entry("latent_pos_embed.pos_embed", "latent_positions", (config.latent_table_side**2, d)),
        *linear("llm2vae", "llm2vae", p, d),
    ]


def decoder_entries(config: BagelConfig, i: int) -> list[Entry]:
    """One layer of the decoder, both experts."""
    text = config.text
    d, f, e = text.hidden_size, text.intermediate_size, text.head_dim
    kv = text.num_key_value_heads * e
    table: list[Entry] = []
    for expert, suffix in EXPERTS.items():
        source, target = f"language_model.model.layers.{i}", f"decoder.layers.{i}.{expert}"
        for name, out in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            attention = f"{source}.self_attn.{name}{suffix}"
            table += linear(attention, f"{target}.{name}", out, d, bias=name != "o_proj")
        for name in ("q_norm", "k_norm"):
            table += norm(f"{source}.self_attn.{name}{suffix}", f"{target}.{name}", e)
        for name in ("input_layernorm", "post_attention_layernorm"):
            table += norm(f"{source}.{name}{suffix}", f"{target}.{name}", d)
        for name, out, width in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            table += linear(f"{source}.mlp{suffix}.{name}", f"{target}.mlp.{name}", out, width, bias=False)
    return table


def vision_entries(config: BagelConfig) -> list[Entry]:
    """The vision transformer, whose patch embedding is a matrix in the official checkpoint too."""
    d = config.vision.hidden_size
    positions = (config.vision_table_side**2, d)
    return [
        *linear(f"{VIT}.embeddings.patch_embedding", "vision.patch_embedding", d, 3 * config.vision_patch_size**2),
        Entry(f"{VIT}.embeddings.position_embedding.weight", "vision.position_embedding.weight", positions),
        *(e.under(f"{VIT}.encoder.", "vision.") for e in siglip_layers(config.vision)),
        *norm(f"{VIT}.post_layernorm", "vision.post_layernorm", d, bias=True),
    ]  # fmt: skip


def siglip_layers(config: VisionConfig) -> list[Entry]:
    """The layers of SigLIP by Hugging Face's names, which are ours too."""
    d, f = config.hidden_size, config.intermediate_size
    table: list[Entry] = []
    for i in range(config.num_hidden_layers):
        for name in ("layer_norm1", "layer_norm2"):
            table += norm(f"layers.{i}.{name}", f"layers.{i}.{name}", d, bias=True)
        sizes = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
        for name, (out, width) in (sizes | {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}).items():
            table += linear(f"layers.{i}.{name}", f"layers.{i}.{name}", out, width)
    return table


CONVERTER = Converter("bagel", "BAGEL-7B-MoT (ByteDance-Seed/BAGEL-7B-MoT)", detect, plan)
