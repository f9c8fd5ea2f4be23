"""Show-o2's official config.json, the configs that it names, and a tokenizer -> our config.

The official code keeps more in code than in files: the head's sizes, the autoencoder's, and the tokens that it adds
to Qwen's vocabulary. Files beside config.json overrule these constants, which the tiny checkpoint of the tests needs:
diffusion_head_config.json, vae_config.json, inference_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.show_o2_config import ShowO2Config
from mlx_transfusion.models.show_o2_head import HeadConfig
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.models.wan_vae import WanConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SpecialIds, Tokenizer

from .sources import Checkpoint, Source

QWEN: dict[str, Any] = {
    "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "hidden_act": "silu",
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B-Instruct": QWEN | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B-Instruct": QWEN | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "siglip-so400m-patch14-384": {"vision_config": SIGLIP},
}  # fmt: skip
"""Sizes of the models that config.json names, for folders that do not hold their configs."""
WAN = WanConfig(
    dim=96,
    z_dim=16,
    latent_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
                 -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    latent_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
                1.6382, 1.1253, 2.8251, 1.9160),
)  # fmt: skip
TOKENS = {
    "bos_id": "<|im_start|>", "eos_id": "<|im_end|>", "boi_id": "<|vision_start|>", "eoi_id": "<|vision_end|>",
    "img_pad_id": "<|image_pad|>", "vid_pad_id": "<|video_pad|>", "pad_id": "[PAD]", "img_id": "<image>",
    "bov_id": "<|vid_start|>", "eov_id": "<|vid_end|>",
}  # fmt: skip
"""Names of the structural tokens; Qwen's own tokenizer lacks the last four, which are never read."""
NEEDED = ("bos_id", "eos_id", "boi_id", "eoi_id")
AROUND = {
    "picture_before": "system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "question": "Describe this image in detail.",
    "question_after": "\n<|im_start|>assistant\n",
}
"""What the official program puts around a picture and a question."""


def read_config(source: Source, checkpoint: Checkpoint) -> ShowO2Config:
    """Our config of an official folder. Raises UserError for missing keys and for options that are not known."""
    data, file = source.json(), source.folder / "config.json"
    for key in ("add_qk_norm", "add_time_embeds"):
        if data.get(key) is not True:
            raise UserError(f"{file}: {key} is {data.get(key)!r}, and only true can be converted")
    vision, rows = _vision(source, data, file)
    stored = checkpoint.tensors.get(
        "position_embedding.weight"
    )  # a table that was resized in training tells it
    given = source.json("vae_config.json")
    coder = _fields(WanConfig, given, source.folder / "vae_config.json") if given else WAN
    if (latents := _number(data, "image_latent_dim", file)) != coder.z_dim:
        raise UserError(
            f"{file}: image_latent_dim is {latents}, and the autoencoder has {coder.z_dim} channels"
        )
    return ShowO2Config(
        text=_text(source, data, file),
        vision=vision,
        head=_head(source, data),
        autoencoder=coder,
        grid_height=_number(data, "image_latent_height", file),
        grid_width=_number(data, "image_latent_width", file),
        position_rows=stored.shape[0] if stored and stored.shape else rows,
        patch_size=_number(data, "patch_size", file),
        **_tokens(source),
    )


def _number(data: Mapping[str, Any], key: str, file: Path) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{file}: {key} is {value!r}, expected a whole number")
    return value


def _named(source: Source, data: Mapping[str, Any], key: str, file: Path) -> tuple[dict[str, Any], Path]:
    """The config of a model that config.json names: of a folder inside SOURCE, else what is known of it."""
    name = str(data.get(key) or "")
    place = f"{name}/config.json"
    if name and not name.startswith(("/", "..")) and source.has(place):
        return source.json(place), source.folder / place
    known = KNOWN.get(name.rstrip("/").rpartition("/")[2])
    if known is None:
        raise UserError(
            f"{file}: {key} is {name!r}: put the config.json of that model into {source.folder}/{name}"
        )
    return known, file


def _text(source: Source, data: Mapping[str, Any], file: Path) -> LlamaConfig:
    found, place = _named(source, data, "llm_model_path", file)
    vocabulary = _number(data, "llm_vocab_size", file)
    kept = {k: v for k, v in found.items() if k not in ("model_type", "bos_token_id", "eos_token_id")}
    return _fields(LlamaConfig, kept | {"vocab_size": vocabulary, "qkv_bias": True}, place)


def _vision(source: Source, data: Mapping[str, Any], file: Path) -> tuple[VisionConfig, int]:
    """SigLIP's sizes, and the rows of its table of positions. The official code leaves the last layer out."""
    found, place = _named(source, data, "clip_pretrained_model_path", file)
    vision = found.get("vision_config", found)
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"{place}: hidden_act is {vision['hidden_act']!r}, expected gelu_pytorch_tanh")
    layers = {"num_hidden_layers": _number(vision, "num_hidden_layers", place) - 1}
    side = _number(vision, "image_size", place) // max(1, _number(vision, "patch_size", place))
    return _fields(VisionConfig, vision | layers, place), side**2


def _head(source: Source, data: Mapping[str, Any]) -> HeadConfig:
    """The head's sizes: the official constants, but for the number of layers."""
    given = dict(source.json("diffusion_head_config.json"))
    if "rms_norm_eps" in given:
        given["block_norm_eps"] = given.pop("rms_norm_eps")
    layers = {"num_hidden_layers": data["num_diffusion_layers"]} if "num_diffusion_layers" in data else {}
    return _fields(HeadConfig, given | layers, source.folder / "diffusion_head_config.json")


def _fields(kind: Any, data: Mapping[str, Any], file: Path) -> Any:
    """The fields of `kind` that a foreign config has. Raises UserError for missing ones and wrong types."""
    return from_dict(kind, {k: v for k, v in data.items() if k in kind.__dataclass_fields__}, str(file))


def _tokens(source: Source) -> dict[str, Any]:
    """Ids of the structural tokens, and the tokens around a picture to describe (none without a tokenizer)."""
    ids: dict[str, int] = dict(source.json("inference_config.json").get("token_ids", {}))
    file = source.tokenizer_files().get(HUGGINGFACE_FILE)
    words: Tokenizer | None = None
    if isinstance(file, Path):
        words = Tokenizer.load(file, special=SpecialIds(None, None, None, None, None, None))
        control = words.control_tokens
        ids = ids or {key: control[name] for key, name in TOKENS.items() if name in control}
    elif not ids:
        raise UserError(
            f"{source.folder}: holds no {HUGGINGFACE_FILE}: name that of Qwen2.5-Instruct with --tokenizer"
        )
    if missing := [TOKENS[key] for key in NEEDED if key not in ids]:
        raise UserError(f"{source.folder}: has no token {missing[0]}: use the tokenizer of Qwen2.5-Instruct")
    return {
        **{f"{key.removesuffix('_id')}_token_id": ids[key] for key in NEEDED},
        "pad_token_id": ids.get("pad_id"),
        "structural": tuple(sorted(i for key, i in ids.items() if key not in (*NEEDED, "pad_id"))),
        **{name: tuple(words.encode_template(text)) if words else () for name, text in AROUND.items()},
    }
