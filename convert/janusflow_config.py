"""JanusFlow's official config.json, processor and tokenizer -> our config.

The official config leaves out what the official code fixes: the vision tower is named by a model of a table, and the
latent picture has 48 x 48 elements. Keys of these things in the same tables overrule that, which the tiny checkpoints
of the tests use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.convnext import ConvNextConfig
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.siglip import SiglipConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SpecialIds, Tokenizer

from .sources import Source

Table = Mapping[str, Any]

SIGLIP: dict[str, dict[str, int]] = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
    "siglip_large_patch16_256": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
}
"""Vision towers that config.json may name."""
LATENT_SIZE = 48
LLAMA_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "head_dim",
    "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "attention_bias", "mlp_bias",
    "tie_word_embeddings",
)  # fmt: skip
TAGS = {
    "image_tag": "<image_placeholder>", "image_start_tag": "<begin_of_image>", "image_end_tag": "<end_of_image>",
    "image_gen_tag": "<｜begin▁of▁generation｜>",
}  # fmt: skip
"""Keys of processor_config.json for the structural tokens, and what the official processor takes without them."""
PAD = "<｜▁pad▁｜>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The official system message in front of a picture; the model was tuned with these very words."""
QUESTION = "Describe this image in detail."


def read_config(source: Source) -> JanusFlowConfig:
    """Our config of an official folder. Raises UserError for missing keys or tokens and for sizes that disagree."""
    official, file = source.json(), source.folder / "config.json"
    try:
        vision = official["vision_und_enc_config"]["params"]
        painting = [official[f"vision_gen_{part}_config"]["params"] for part in ("enc", "dec")]
        return JanusFlowConfig(
            text=_text(official["language_config"]),
            vision=_vision(vision),
            painting=_painting(*painting),
            **_tokens(source),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{file}: not the config of a JanusFlow: {error} is missing or of another kind"
        ) from error


def _text(said: Table) -> LlamaConfig:
    if said.get("rope_scaling") is not None or said.get("hidden_act", "silu") != "silu":
        raise UserError("config.json: the language model has a rope_scaling or hidden_act of another kind")
    return LlamaConfig(**{name: said[name] for name in LLAMA_FIELDS if said.get(name) is not None})


def _vision(params: Table) -> SiglipConfig:
    tower = SIGLIP.get(params["model_name"], {}) | dict(params)
    layers, select = tower["layers"], params.get("select_layer", -1)
    return SiglipConfig(
        image_size=params["image_size"],
        patch_size=tower["patch_size"],
        hidden_size=tower["width"],
        # Blocks behind the selected one do not run; a negative number counts from the end, -1 being the last.
        num_hidden_layers=min(layers, select if select > 0 else layers + select + 1),
        num_attention_heads=tower["heads"],
        intermediate_size=int(tower["width"] * tower.get("mlp_ratio", 4)),
    )


def _painting(encoder: Table, decoder: Table) -> ConvNextConfig:
    """Sizes of picture encoder and decoder. Raises UserError for another form than the published one's."""
    channels, patch = encoder["block_out_channels"][-1], encoder["stride"]
    agree = {
        "kernel_size": (encoder["kernel_size"], patch),
        "padding": (encoder.get("padding") or 0, 0),
        "upsamples": (decoder["upsamples"], 1),
        "in_channels": (decoder["in_channels"], channels),
        "block_out_channels": (decoder["block_out_channels"][-1], channels),
        "out_channels": (decoder["out_channels"], encoder["input_channels"]),
        "layers_in_middle": (decoder["layers_in_middle"], encoder["layers_in_middle"]),
        "stride": (patch, 2),
    }
    if wrong := [f"{name} is {a!r} for {b!r}" for name, (a, b) in agree.items() if a != b]:
        raise UserError(
            f"config.json: the picture encoder or decoder is not of the form of JanusFlow-1.3B: {'; '.join(wrong)}"
        )
    return ConvNextConfig(
        latent_channels=encoder["input_channels"],
        latent_size=encoder.get("latent_size", LATENT_SIZE),
        patch_size=patch,
        channels=channels,
        blocks=encoder["layers_in_middle"],
        norm_eps=encoder.get("norm_eps", 1e-6),
    )


def _tokens(source: Source) -> dict[str, Any]:
    """The fields that come from the tokenizer: structural ids, and the tokens around a picture to describe."""
    file = source.tokenizer_files().get(HUGGINGFACE_FILE)
    if not isinstance(file, Path):
        raise UserError(f"{source.folder}: holds no {HUGGINGFACE_FILE}: name one with --tokenizer")
    data = read_json(file)
    ids: dict[str, int] = dict(data["model"]["vocab"]) | {
        t["content"]: t["id"] for t in data.get("added_tokens", [])
    }
    settings, processor = source.json("tokenizer_config.json"), source.json("processor_config.json")
    tags = {key: processor.get(key, name) for key, name in TAGS.items()}

    def find(name: Any) -> int:
        name = name["content"] if isinstance(name, dict) else name
        if name not in ids:
            raise UserError(f"{file}: has no token {name!r}: use the tokenizer of the checkpoint")
        return ids[name]

    special = SpecialIds(
        pad=find(settings.get("pad_token") or PAD),
        bos=find(settings["bos_token"]),
        eos=find(settings["eos_token"]),
        unk=None,
        boi=find(tags["image_start_tag"]),
        eoi=find(tags["image_end_tag"]),
    )
    words = Tokenizer.load(file, special=special)
    return {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "boi_token_id": special.boi,
        "eoi_token_id": special.eoi,
        "placeholder_token_id": find(tags["image_tag"]),
        # The official processor adds it to a tokenizer that lacks it, for it is never embedded.
        "generation_token_id": ids.get(tags["image_gen_tag"]),
        # Newlines are tokens of their own in this tokenizer, so pieces give the tokens of the whole.
        "picture_before": tuple(words.encode(f"{SYSTEM}\n\nUser: ")),
        "question": tuple(words.encode(QUESTION)),
        "question_before": tuple(words.encode("\n")),
        "question_after": tuple(words.encode("\n\nAssistant:")),
    }
