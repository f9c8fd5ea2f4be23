"""AutoencoderKL: diffusers' folders, and the original files of Stable Diffusion and FLUX (`ae.safetensors`).

Our names are diffusers' of today. `entries` gives the table of one checkpoint in any of three spellings, also to
families that hold an autoencoder: `[e.under("", "vae.") for e in entries(config)]`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL

from .sources import Checkpoint, Source
from .table import WHOLE, Card, Converter, Entry, Plan, Shape, conv2d, linear, norm, reshape

MARK = "decoder.mid_block.resnets.0.conv1.weight"
ORIGINAL_MARK = "decoder.mid.block_1.conv1.weight"
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names before diffusers 0.14, which may store the matrices as 1x1 convolutions."""
ORIGINAL_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def entries(config: AutoencoderConfig, spelling: str = "diffusers", flat: bool = True) -> list[Entry]:
    """Every tensor of a checkpoint. spelling: "diffusers", "old" (before 0.14) or "original" (ae.safetensors).

    flat: whether attention's matrices are [C, C], not [C, C, 1, 1] (always the latter in the original spelling).
    """
    table = [*_encoder(config), *_decoder(config)]
    c = config.latent_channels
    if config.use_quant_conv:
        table += conv2d("quant_conv", "quant_conv", 2 * c, 2 * c, 1)
    if config.use_post_quant_conv:
        table += conv2d("post_quant_conv", "post_quant_conv", c, c, 1)
    if spelling == "diffusers" and flat:
        return table
    return [_spelt(entry, spelling, flat, len(config.block_out_channels)) for entry in table]


def _encoder(config: AutoencoderConfig) -> list[Entry]:
    channels = config.block_out_channels
    table = _conv3("encoder.conv_in", config.stem, config.in_channels)
    before = config.stem
    for i, width in enumerate(channels):
        block = f"encoder.down_blocks.{i}"
        for j in range(config.layers_per_block):
            table += _resnet(f"{block}.resnets.{j}", before, width)
            before = width
        if i < len(channels) - 1:
            table += _conv3(f"{block}.downsamplers.0.conv", width, width)
    table += _middle("encoder.mid_block", channels[-1], config.mid_block_add_attention)
    table += norm("encoder.conv_norm_out", "encoder.conv_norm_out", channels[-1], bias=True)
    return table + _conv3("encoder.conv_out", 2 * config.latent_channels, channels[-1])


def _decoder(config: AutoencoderConfig) -> list[Entry]:
    channels = config.block_out_channels[::-1]
    table = _conv3("decoder.conv_in", channels[0], config.latent_channels)
    table += _middle("decoder.mid_block", channels[0], config.mid_block_add_attention)
    before = channels[0]
    for i, width in enumerate(channels):
        block = f"decoder.up_blocks.{i}"
        for j in range(config.layers_per_block + 1):
            table += _resnet(f"{block}.resnets.{j}", before, width)
            before = width
        if i < len(channels) - 1:
            table += _conv3(f"{block}.upsamplers.0.conv", width, width)
    table += norm("decoder.conv_norm_out", "decoder.conv_norm_out", channels[-1], bias=True)
    return table + _conv3("decoder.conv_out", config.out_channels, channels[-1])


def _resnet(name: str, inputs: int, outputs: int) -> list[Entry]:
    table = norm(f"{name}.norm1", f"{name}.norm1", inputs, bias=True)
    table += _conv3(f"{name}.conv1", outputs, inputs)
    table += norm(f"{name}.norm2", f"{name}.norm2", outputs, bias=True)
    table += _conv3(f"{name}.conv2", outputs, outputs)
    shortcut = f"{name}.conv_shortcut"
    return table + (conv2d(shortcut, shortcut, outputs, inputs, 1) if inputs != outputs else [])


def _middle(name: str, width: int, attends: bool) -> list[Entry]:
    table = [*_resnet(f"{name}.resnets.0", width, width), *_resnet(f"{name}.resnets.1", width, width)]
    if attends:
        at = f"{name}.attentions.0"
        table += norm(f"{at}.group_norm", f"{at}.group_norm", width, bias=True)
        for part in OLD_ATTENTION:
            table += linear(f"{at}.{part}", f"{at}.{part}", width, width)
    return table


def _conv3(name: str, outputs: int, inputs: int) -> list[Entry]:
    return conv2d(name, name, outputs, inputs, 3)


# ---- other spellings ----


def _spelt(entry: Entry, spelling: str, flat: bool, levels: int) -> Entry:
    source, shape, op = entry.source, entry.shape, entry.op
    if spelling == "original":
        source = original_name(source, levels)
    elif spelling == "old":
        source = re.sub(r"(attentions\.0)\.(to_[qkv]|to_out\.0)\.", _old_attention, source)
    if not flat and re.search(r"attentions\.0\.to_\S+\.weight$", entry.source):
        shape, op = (*entry.shape, 1, 1), reshape(*entry.shape)
    return Entry(source, entry.target, shape, op)


def _old_attention(match: re.Match[str]) -> str:
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}."


def original_name(name: str, levels: int) -> str:
    """diffusers' name -> that of the original code, which counts the decoder's sizes from the full one."""
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return name
    words = rest.split(".")
    if words[0] in ("down_blocks", "up_blocks"):
        level = int(words[1]) if words[0] == "down_blocks" else levels - 1 - int(words[1])
        at = [words[0].removesuffix("_blocks"), str(level)]
        if words[2] == "resnets":
            return ".".join([part, *at, "block", words[3], *_original_resnet(words[4:])])
        return ".".join([part, *at, words[2].removesuffix("rs").removesuffix("e") + "e", *words[4:]])
    if words[0] == "mid_block" and words[1] == "resnets":
        return ".".join([part, "mid", f"block_{int(words[2]) + 1}", *_original_resnet(words[3:])])
    if words[0] == "mid_block":
        inner = ".".join(words[3:-1])
        inner = ORIGINAL_ATTENTION.get(inner, "norm")
        return ".".join([part, "mid.attn_1", inner, words[-1]])
    return f"{part}.{rest}".replace("conv_norm_out", "norm_out")


def _original_resnet(words: list[str]) -> list[str]:
    return ["nin_shortcut" if word == "conv_shortcut" else word for word in words]


def spelling_of(names: Collection[str], shapes: dict[str, Shape]) -> tuple[str, bool]:
    """(spelling, flat) of a checkpoint with tensors of these names: what `entries` takes."""
    if ORIGINAL_MARK in names:
        return "original", False
    for spelling, part in (("old", "query"), ("diffusers", "to_q")):
        name = f"decoder.mid_block.attentions.0.{part}.weight"
        if name in names:
            return spelling, len(shapes[name]) == 2
    return "diffusers", True


# ---- the converter ----


def read_checkpoint(checkpoint: Checkpoint, config: AutoencoderConfig) -> list[Entry]:
    """The table that fits the spelling of an opened checkpoint."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return entries(config, *spelling_of(shapes.keys(), shapes))


def detect(source: Source) -> bool:
    """By the class that config.json names, or by names of tensors; not a larger model that holds an autoencoder."""
    if source.json().get("_class_name") == "AutoencoderKL":
        return True
    names = source.names()
    return bool({MARK, ORIGINAL_MARK} & names) and all(
        name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in names
    )


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for a graph that ours is not, and for a missing config.json."""
    file, data = source.folder / "config.json", source.json()
    if not data:
        raise UserError(f"{file}: missing: put diffusers' config.json of this autoencoder beside its weights")
    config = AutoencoderConfig.from_diffusers(data, str(file))
    checkpoint = source.open()
    return Plan(
        family="autoencoder",
        config=config.to_dict(),
        parts={"": checkpoint},
        entries=tuple(read_checkpoint(checkpoint, config)),
        files={},
        card=Card(
            source.name or source.folder.name,
            "unknown",
            "See the original's page.",
            pipeline="image-to-image",
        ),
        precision=lambda path: WHOLE,
        model=AutoencoderKL(config),
    )


CONVERTER = Converter(
    "autoencoder", "AutoencoderKL (diffusers: Stable Diffusion, SDXL, FLUX, 8 channels)", detect, plan
)
