"""JanusFlow (deepseek-ai): the model from its folder, and the SDXL autoencoder that it paints with from another."""

from __future__ import annotations

import dataclasses

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.autoencoder import AutoencoderConfig
from mlx_transfusion.models.convnext import WIDENING, ConvNextConfig
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.siglip import SiglipConfig

from . import autoencoder, llama
from .hub import locate
from .janusflow_config import read_config
from .sources import Checkpoint, Source
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
    unused,
)

CODER = "autoencoder."
"""In front of the autoencoder's names, in the plan and in our model."""
GENERATION = {"sampler": "ddim", "spacing": "flow", "steps": 30, "guidance": 2.0}
"""The official demo: Euler on an even grid of flow times."""
NOTES = (
    "It paints as the official program does: sampler ddim, spacing flow, 30 steps, guidance 2. "
    "`describe` asks for a description, `describe --question` anything else about a picture."
)
POOLING = "the pooling head of SigLIP, which the official model does not run either"


def detect(source: Source) -> bool:
    """Janus and Janus-Pro have the same model_type, but codes where JanusFlow has an encoder."""
    config = source.json()
    return config.get("model_type") == "multi_modality" and "vision_gen_enc_config" in config


def plan(source: Source) -> Plan:
    """The conversion of an official folder. Raises UserError for missing parts and for sizes that do not agree."""
    coder, checkpoint = open_autoencoder(source)
    config = dataclasses.replace(read_config(source), autoencoder=coder)
    latents = [e.under(CODER, CODER) for e in autoencoder.read_checkpoint(checkpoint, coder)]
    return Plan(
        family="janusflow",
        config=config.to_dict(),
        extra={"generation": GENERATION},
        parts={"": source.open(), CODER: checkpoint},
        entries=(*entries(config), *latents),
        files=source.tokenizer_files(),
        card=Card(
            "deepseek-ai/JanusFlow-1.3B",
            "other",
            "DeepSeek Model License: commercial use is allowed, with the restrictions of its attachment A.",
            "https://github.com/deepseek-ai/Janus",
            notes=NOTES,
        ),
        precision=precision,
    )


def open_autoencoder(source: Source) -> tuple[AutoencoderConfig, Checkpoint]:
    """The autoencoder of --autoencoder, or of the folder "vae" in SOURCE. Raises UserError where there is none."""
    if source.autoencoder is None and not source.has("vae"):
        raise UserError(
            "JanusFlow paints with an autoencoder that its folder does not hold: name it with --autoencoder "
            "(stabilityai/sdxl-vae, a hub id or a folder)"
        )
    place = source.folder / "vae" if source.autoencoder is None else locate(str(source.autoencoder))
    file = (place if place.is_dir() else place.parent) / "config.json"
    return AutoencoderConfig.from_diffusers(read_json(file), str(file)), source.open(place.absolute())


def precision(path: str) -> Precision:
    """Llama and SigLIP low; the picture encoder and decoder, which every number painted passes, high."""
    if path.startswith(("language_model.model.layers.", "vision_und_enc_model.blocks.")):
        return LOW
    high = ("language_model.", "vision_gen_enc_model.mid_block.", "vision_gen_dec_model.mid_block.")
    return HIGH if path.startswith(high) else WHOLE


def entries(config: JanusFlowConfig) -> list[Entry]:
    """Every tensor of the official checkpoint of this config, which holds no autoencoder."""
    width, painting = config.text.hidden_size, config.painting
    enc, dec = "vision_gen_enc_model", "vision_gen_dec_model"
    return [
        Entry("beg_of_und_embed", "beg_of_und_embed", (1, width)),
        *(
            e.under("vision_und_enc_model.vision_tower.", "vision_und_enc_model.")
            for e in vision_entries(config.vision)
        ),
        *same_linear("vision_und_enc_aligner", width, config.vision.hidden_size),
        *same_linear(f"{enc}.time_embed.linear_1", width, painting.channels),
        *same_linear(f"{enc}.time_embed.linear_2", width, width),
        *conv2d(
            f"{enc}.in_conv",
            f"{enc}.in_conv",
            painting.channels,
            painting.latent_channels,
            painting.patch_size,
        ),
        *block_entries(enc, painting, painting.channels, width),
        *same_linear("vision_gen_enc_aligner", width, painting.channels),
        *block_entries(dec, painting, 2 * painting.channels, width),
        *unpatchify_entries(f"{dec}.out_convs.0", painting),
        *norm(f"{dec}.input_norm", f"{dec}.input_norm", painting.channels),
        *(e.under("language_model.", "language_model.") for e in llama.entries(config.text)),
        *norm("vision_gen_dec_aligner_norm", "vision_gen_dec_aligner_norm", width),
        *same_linear("vision_gen_dec_aligner", painting.channels, width),
    ]


def vision_entries(config: SiglipConfig) -> list[Entry]:
    """timm's SigLIP tower, with the head that is not used."""
    d, f = config.hidden_size, config.intermediate_size
    table = [
        Entry("pos_embed", "pos_embed", (1, config.patches, d)),
        *conv2d("patch_embed.proj", "patch_embed.proj", d, 3, config.patch_size),
        *norm("norm", "norm", d, bias=True),
        unused("attn_pool.latent", (1, 1, d), POOLING),
    ]
    for i in range(config.num_hidden_layers):
        block = f"blocks.{i}"
        table += norm(f"{block}.norm1", f"{block}.norm1", d, bias=True)
        table += same_linear(f"{block}.attn.qkv", 3 * d, d)
        table += same_linear(f"{block}.attn.proj", d, d)
        table += norm(f"{block}.norm2", f"{block}.norm2", d, bias=True)
        table += same_linear(f"{block}.mlp.fc1", f, d)
        table += same_linear(f"{block}.mlp.fc2", d, f)
    head = {"q": (d, d), "kv": (2 * d, d), "proj": (d, d), "norm": (d,), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    for name, shape in head.items():
        table += [
            unused(f"attn_pool.{name}.weight", shape, POOLING),
            unused(f"attn_pool.{name}.bias", shape[:1], POOLING),
        ]
    return table


def block_entries(part: str, config: ConvNextConfig, channels: int, width: int) -> list[Entry]:
    """The ConvNeXt blocks of the picture encoder or decoder."""
    table: list[Entry] = []
    wide = WIDENING * channels
    for i in range(config.blocks):
        block = f"{part}.mid_block.res_blocks.{i}"
        table += conv2d(f"{block}.depthwise", f"{block}.depthwise", channels, 1, 7)
        table += norm(f"{block}.norm", f"{block}.norm", channels)
        table += same_linear(f"{block}.channelwise_linear_1", wide, channels)
        table += [
            Entry(f"{block}.channelwise_norm.{n}", f"{block}.channelwise_norm.{n}", (1, 1, 1, wide))
            for n in ("weight", "bias")
        ]
        table += same_linear(f"{block}.channelwise_linear_2", channels, wide)
        table += same_linear(f"{block}.cond_embeds_mapper", 2 * channels, width)
    return table


def unpatchify_entries(name: str, config: ConvNextConfig) -> list[Entry]:
    """The end of the picture decoder."""
    channels = 2 * config.channels
    conv = f"{name}.unpatch_conv"
    return [
        *norm(f"{name}.norm", f"{name}.norm", channels),
        *conv2d(conv, conv, config.latent_channels * config.patch_size**2, channels, 1),
    ]


def same_linear(name: str, out: int, width: int) -> list[Entry]:
    """A linear layer that has the same name in both models."""
    return linear(name, name, out, width)


CONVERTER = Converter("janusflow", "JanusFlow-1.3B (deepseek-ai/JanusFlow-1.3B)", detect, plan)
