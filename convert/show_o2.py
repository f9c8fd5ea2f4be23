"""Show-o2 (showlab/show-o2-1.5B, -7B, HQ and video understanding): the unified model, and the Wan autoencoder."""

from __future__ import annotations

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.show_o2_config import ShowO2Config

from . import wan_vae
from .bagel import siglip_layers
from .hub import locate
from .show_o2_config import read_config
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
    conv2d,
    linear,
    norm,
    patch_matrix,
    unused,
)

VAE_FILES = ("vae.safetensors", "Wan2.1_VAE.pth")
"""Where SOURCE may hold the autoencoder itself."""
CODER = "autoencoder."
"""In front of the autoencoder's names, in the plan and in our model."""
GENERATION = {"sampler": "ddim", "spacing": "shifted", "steps": 49, "guidance": 7.5}
"""The official demo's Euler steps and scale."""
CARD = Card(
    "showlab/show-o2-1.5B", "apache-2.0", url="https://github.com/showlab/Show-o",
    notes="The autoencoder is that of Wan 2.1 (Wan-AI), also apache-2.0. `describe --question` asks about a picture. "
    "It reads and paints pictures, no films.",
)  # fmt: skip


def detect(source: Source) -> bool:
    """By the class that config.json names, or by the names of the head."""
    if source.json().get("_class_name") == "Showo2Qwen2_5":
        return True
    return {"fusion_proj.1.weight", "diffusion_head_b.linear.weight"} <= source.names()


def plan(source: Source) -> Plan:
    """The conversion of an official folder. Raises UserError for missing parts and keys, and for unknown options."""
    inside = next((f for f in VAE_FILES if source.has(f)), None)
    if inside is None and source.autoencoder is None:
        raise UserError(
            "Show-o2 paints with an autoencoder that its folder does not hold: name it with --autoencoder "
            "(Wan2.1_VAE.pth of Wan-AI/Wan2.1-T2V-1.3B)"
        )
    place = locate(str(source.autoencoder)) if source.autoencoder else source.folder / str(inside)
    checkpoint = source.open()
    config = read_config(source, checkpoint)
    return Plan(
        family="show_o2",
        config=config.to_dict(),
        parts={"": checkpoint, CODER: source.open(place.absolute())},
        entries=(*entries(config), *(e.under(CODER, CODER) for e in wan_vae.entries(config.autoencoder))),
        files=source.tokenizer_files(),
        card=CARD,
        precision=precision,
        extra={"generation": GENERATION},
    )


def precision(path: str) -> Precision:
    """Language model and semantic layers low, the flow head high; time, patches, fusion and autoencoder whole."""
    if path.startswith(("model.layers.", "vision.layers.")):
        return LOW
    high = path in ("model.embed_tokens", "lm_head") or path.startswith("flow_head.layers.")
    return HIGH if high else WHOLE


def entries(config: ShowO2Config) -> list[Entry]:
    """Every tensor of the official checkpoint of this config."""
    d, c, h = config.text.hidden_size, config.vision.hidden_size, config.head.hidden_size
    p, latents = config.patch_size, config.autoencoder.z_dim
    table = text_entries(config)
    for name, out in (("und", c), ("gen", d)):
        table += conv2d(
            f"image_embedder_{name}.proj",
            f"vision.embed_{name}",
            out,
            latents,
            p,
            op=patch_matrix(out, latents, p),
        )
    table += [
        Entry("position_embedding.weight", "vision.positions.weight", (config.position_rows, c)),
        *(e.under("und_trans.", "vision.") for e in siglip_layers(config.vision)),
        *norm("fusion_proj.0", "vision.norm", c + d),
        *linear("fusion_proj.1", "vision.fc1", d, c + d),
        *linear("fusion_proj.3", "vision.fc2", d, d),
        *linear("time_embed.mlp.0", "time_embed.fc1", h, 256),
        *linear("time_embed.mlp.2", "time_embed.fc2", h, h),
    ]
    if h != d:
        table += linear("time_embed_proj", "time_proj", d, h)
        table += linear("diff_proj.0", "flow_head.fc1", h, d)
        table += linear("diff_proj.2", "flow_head.fc2", h, h)
    return table + head_entries(config)


def text_entries(config: ShowO2Config) -> list[Entry]:
    """Qwen2 under the name `showo`."""
    text = config.text
    d, f, kv = text.hidden_size, text.intermediate_size, text.kv_heads * text.head_dim
    words = (config.vocab_size, d)
    table = [
        Entry("showo.model.embed_tokens.weight", "model.embed_tokens.weight", words),
        *norm("showo.model.norm", "model.norm", d),
    ]
    if text.tie_word_embeddings:
        table.append(
            Entry(
                "showo.lm_head.weight", None, words, optional=True, same_as="showo.model.embed_tokens.weight"
            )
        )
    else:
        table.append(Entry("showo.lm_head.weight", "lm_head.weight", words))
    for i in range(text.num_hidden_layers):
        source, target = f"showo.model.layers.{i}", f"model.layers.{i}"
        for name, out in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            place = f"self_attn.{name}"
            table += linear(f"{source}.{place}", f"{target}.{place}", out, d, bias=name != "o_proj")
        for name in ("input_layernorm", "post_attention_layernorm"):
            table += norm(f"{source}.{name}", f"{target}.{name}", d)
        for name, out, width in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            table += linear(f"{source}.mlp.{name}", f"{target}.mlp.{name}", out, width, bias=False)
        buffer = f"{source}.self_attn.rotary_emb.inv_freq"
        table.append(unused(buffer, (text.head_dim // 2,), "computed from the config", optional=True))
    return table


def head_entries(config: ShowO2Config) -> list[Entry]:
    """The flow head."""
    head = config.head
    d, f, kv = head.hidden_size, head.intermediate_size, head.kv_heads * head.head_dim
    table: list[Entry] = []
    for i in range(head.num_hidden_layers):
        source, target = f"diffusion_head_a.{i}", f"flow_head.layers.{i}"
        sizes = {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        for name, (out, width) in sizes.items():
            table += linear(f"{source}.{name}", f"{target}.{name}", out, width, bias=False)
        for name, width in (("input_layernorm", d), ("post_attention_layernorm", d),
                            ("self_attn.q_norm", head.head_dim), ("self_attn.k_norm", head.head_dim)):  # fmt: skip
            table += norm(f"{source}.{name}", f"{target}.{name}", width)
        table += linear(f"{source}.adaLN_modulation.1", f"{target}.steering.linear", 6 * d, d)
    return [
        *table,
        *norm("diffusion_head_b.norm_final", "flow_head.norm", d),
        *linear("diffusion_head_b.adaLN_modulation.1", "flow_head.steering.linear", 2 * d, d),
        *linear("diffusion_head_b.linear", "flow_head.linear", config.latent_numbers, d),
    ]


CONVERTER = Converter("show_o2", "Show-o2 (showlab/show-o2-1.5B, -1.5B-HQ, -7B)", detect, plan)
