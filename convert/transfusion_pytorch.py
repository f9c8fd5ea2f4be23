"""State dicts of transfusion-pytorch (lucidrains), versions 0.19.7 and 0.20; those since 0.19.0 share their names.

The package has no config file: config.json, beside the weights or named by --config, holds the keyword arguments of
its constructor, with `transformer` as an object. What it leaves out has the constructor's default; sizes that the
tensors show must agree with them. Encoders and decoders of pixels are the user's own code there, and left out: for
latents of an AutoencoderKL name it with --autoencoder. The state of the package's EMA is converted as its averaged
weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.lucidrains_config import LucidrainsConfig, ModalityConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE

from .coder import CODER, open_coder
from .safetensors_file import TensorInfo
from .sources import Source
from .table import HIGH, LOW, WHOLE, Card, Converter, Entry, Plan, Precision, linear, unused, vector
from .tokenizer_marks import number_tokenizer, with_marks
from .transfusion_pytorch_config import read_config

EMA = "ema_model."
MARKS = frozenset({"transformer.to_time_cond.0.weights", "rotary_emb.freqs", "to_text_logits.weight"})
PIXELS = ("modality_encoder.", "modality_decoder.")


def entries(config: LucidrainsConfig) -> list[Entry]:
    """The table of names and shapes of a state dict."""
    d, v = config.dim, config.vocab_size
    table = [
        Entry("text_embed.weight", "embed_tokens.weight", (v, d)),
        Entry("to_text_logits.weight", "lm_head.weight", (v, d)),
        vector("rotary_emb.freqs", "rotary_frequencies", config.dim_head // 2),
        vector("transformer.to_time_cond.0.weights", "time.frequencies", d // 2),
        *linear("transformer.to_time_cond.1", "time.linear", 4 * d, d + 1),
        vector("transformer.norm.gamma", "norm.gamma", d),
    ]
    for i in range(config.depth):
        table += _layer(config, i)
    for i, modality in enumerate(config.modalities):
        table += _modality(modality, i, d)
    return table


def _layer(config: LucidrainsConfig, index: int) -> list[Entry]:
    d, f = config.dim, config.ff_inner
    source, target = f"transformer.layers.{index}", f"layers.{index}"
    table = [
        *_conditioned(f"{source}.1", f"{target}.attention", d),
        *_attention(config, index, f"{source}.1.fn", f"{target}.attention.layer"),
        *_conditioned(f"{source}.2", f"{target}.feed_forward", d),
        *linear(f"{source}.2.fn.net.0", f"{target}.feed_forward.layer.up", 2 * f, d),
        *linear(f"{source}.2.fn.net.3", f"{target}.feed_forward.layer.down", d, f),
        vector(f"{source}.3.pseudo_queries", f"{target}.mixture.query", d),
        vector(f"{source}.3.norm_keys.gamma", f"{target}.mixture.norm.gamma", d),
    ]
    if config.unet_skips and index >= config.depth / 2:
        table += linear(f"{source}.0", f"{target}.skip", d, 2 * d, bias=False)
    return table


def _conditioned(source: str, target: str, d: int) -> list[Entry]:
    return [
        vector(f"{source}.layernorm_gamma", f"{target}.gain", d),
        vector(f"{source}.layerscale", f"{target}.layerscale", d),
        *linear(f"{source}.to_film", f"{target}.film", 2 * d, 4 * d),
        *linear(f"{source}.to_ada_ln_zero", f"{target}.gate", d, 4 * d),
    ]


def _attention(config: LucidrainsConfig, index: int, source: str, target: str) -> list[Entry]:
    d, inner = config.dim, config.heads * config.dim_head
    table = [
        *linear(f"{source}.to_qk.0", f"{target}.to_qk", 2 * inner, d, bias=False),
        *linear(f"{source}.to_v.0", f"{target}.to_v", inner, d, bias=False),
        *linear(f"{source}.to_out.1", f"{target}.to_out", d, inner, bias=False),
        vector(f"{source}.q_norm.gamma", f"{target}.q_norm.gamma", config.dim_head),
        vector(f"{source}.k_norm.gamma", f"{target}.k_norm.gamma", config.dim_head),
    ]
    if config.gates:
        table += linear(f"{source}.to_gates.0", f"{target}.to_gates", config.heads, d, bias=False)
    if config.value_residual and index:
        table += linear(f"{source}.to_learned_value_residual.0", f"{target}.value_mix", config.heads, d)
    return table


def _modality(modality: ModalityConfig, kind: int, d: int) -> list[Entry]:
    """Channels first put a step that only moves the channels before the one layer, or behind the other."""
    c, ours = modality.dim_latent, f"modalities.{kind}"
    enter, leave = f"latent_to_model_projs.{kind}", f"model_to_latent_projs.{kind}"
    if modality.channel_first:
        enter, leave = f"{enter}.1", f"{leave}.0"
    table = linear(leave, f"{ours}.leave", c, d, bias=False)
    if c != d:
        table += linear(enter, f"{ours}.enter", d, c)
    for axis in range((modality.axes or 0) if modality.axial_positions else 0):
        source, target = f"pos_emb_mlp.{kind}.mlps.{axis}", f"{ours}.positions.axes.{axis}"
        for (theirs, name), (out, width) in zip(
            ((0, "fc1"), (2, "fc2"), (4, "fc3")), ((2 * d, 1), (2 * d, 2 * d), (d, 2 * d)), strict=True
        ):
            table += linear(f"{source}.{theirs}", f"{target}.{name}", out, width)
    return table


def detect(source: Source) -> bool:
    """By tensors that no other model has; below an EMA's prefix too."""
    names = source.names()
    return names >= MARKS or names >= {EMA + name for name in MARKS}


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError where the constructor's arguments are missing or do not fit."""
    file = source.config or source.folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{source.path}: a state dict of transfusion-pytorch does not tell how the model was made: put the "
            "constructor's keyword arguments into a config.json beside it, or name one with --config"
        )
    data = read_json(file)
    ours = data.get("model_type") == LucidrainsConfig.model_type
    config = LucidrainsConfig.from_dict(data, str(file)) if ours else read_config(data, str(file))
    checkpoint, coder = source.open(), open_coder(source)
    parts = {"": checkpoint}
    if coder is not None:
        config = dataclasses.replace(config, autoencoder=coder.config)
        parts[CODER] = coder.checkpoint
    prefix = "" if "text_embed.weight" in checkpoint.tensors else EMA
    table = [entry.under(prefix) for entry in entries(config)] + _left_out(checkpoint.tensors, prefix)
    table += coder.entries if coder is not None else ()
    card = Card(
        "transfusion-pytorch", "unknown", "The package is MIT; ask the author of these weights for theirs.",
        url="https://github.com/lucidrains/transfusion-pytorch",
        notes="The package has no tokenizer. Converted without --tokenizer, a prompt is token ids such as `12 5 77`.",
    )  # fmt: skip
    return Plan(
        LucidrainsConfig.model_type, config.to_dict(), parts, tuple(table), _tokenizer(source, config),
        card, precision,
    )  # fmt: skip


def _tokenizer(source: Source, config: LucidrainsConfig) -> dict[str, bytes | Path]:
    """One file: the user's tokenizer with the marks behind its tokens, or one whose words are ids."""
    files = source.tokenizer_files()
    file = next(
        (files[name] for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE) if name in files), source.tokenizer
    )
    if isinstance(file, Path):
        return dict([with_marks(file, config.num_text_tokens, config.marks)])
    return dict([number_tokenizer(config.num_text_tokens, config.marks)])


def _left_out(tensors: Mapping[str, TensorInfo], prefix: str) -> list[Entry]:
    """What else may stand in the file, each with its reason."""
    own = tuple(prefix + name for name in PIXELS)
    reasons = [
        (own, "an encoder or decoder of pixels in the user's own code: latents are converted"),
        *([(("online_model.",), "the EMA's averaged weights are converted")] if prefix else []),
        *([(("initted", "step"), "bookkeeping of the EMA")] if prefix else []),
    ]
    return [
        unused(name, tuple(info.shape), reason)
        for name, info in tensors.items()
        for starts, reason in reasons
        if name.startswith(starts)
    ]


def precision(path: str) -> Precision:
    """The layers' matrices low, what the time makes of them and the embeddings high, the rest whole."""
    if path in ("embed_tokens", "lm_head") or re.search(r"\.(film|gate)$", path):
        return HIGH
    return LOW if path.startswith("layers.") and not path.endswith(("to_gates", "value_mix")) else WHOLE


CONVERTER = Converter(
    "transfusion_pytorch", "transfusion-pytorch 0.19.7 and 0.20 (without U-Net)", detect, plan
)
