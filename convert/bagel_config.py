"""BAGEL's official files of sizes and its tokenizer -> our config.

The public folder leaves out what the official inference script sets in code. A file inference_config.json with the
same names overrules that, which the tiny checkpoint of the tests needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.bagel_layers import BagelTextConfig
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SpecialIds, Tokenizer

from .sources import Source

INFERENCE: dict[str, dict[str, Any]] = {
    "bagel": {"vit_max_num_patch_per_side": 70, "latent_patch_size": 2, "max_latent_size": 64},
    "ae": {
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16,
        "scale_factor": 0.3611, "shift_factor": 0.1159,
    },
}  # fmt: skip
"""What the official inference script sets in code. A file inference_config.json of the same form overrules it."""
TOKENS = {
    "bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>", "end_of_image": "<|vision_end|>",
}  # fmt: skip
"""The structural tokens by the names of that file's ids, and what they are in the public tokenizer."""
QUESTION = "Describe this image in detail."
NO_SPECIAL = SpecialIds(None, None, None, None, None, None)


def read_config(source: Source) -> BagelConfig:
    """Our config of an official folder. Raises UserError for missing keys and for options that BAGEL does not use."""
    given = source.json("inference_config.json")
    bagel = INFERENCE["bagel"] | given.get("bagel", {})
    ae = INFERENCE["ae"] | given.get("ae", {})
    coder = AutoencoderConfig(
        latent_channels=ae["z_channels"],
        block_out_channels=tuple(ae["ch"] * m for m in ae["ch_mult"]),
        layers_per_block=ae["num_res_blocks"],
        stem_channels=None if ae["ch_mult"][0] == 1 else ae["ch"],
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=ae["scale_factor"],
        shift_factor=ae["shift_factor"],
    )
    vision, patch = _vision(source)
    side, latents = bagel["vit_max_num_patch_per_side"], bagel["max_latent_size"]
    largest = latents * bagel["latent_patch_size"] * coder.factor
    ids, question = _tokens(source, given.get("new_token_ids"))
    return BagelConfig(
        text=_text(source),
        vision=vision,
        vision_patch_size=patch,
        vision_table_side=side,
        latent_table_side=latents,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        boi_token_id=ids["start_of_image"],
        eoi_token_id=ids["end_of_image"],
        image_height=largest,
        image_width=largest,
        input_height=side * patch,
        input_width=side * patch,
        latent_patch_size=bagel["latent_patch_size"],
        autoencoder=coder,
        question=question,
    )


def _text(source: Source) -> BagelTextConfig:
    """Qwen2's sizes. The official code adds norms of queries and keys, and an output matrix of its own."""
    data, file = source.json("llm_config.json"), source.folder / "llm_config.json"
    if data.get("rope_scaling"):
        raise UserError(f"{file}: rope_scaling is {data['rope_scaling']}, and BAGEL has none")
    return _table(BagelTextConfig, data, file)


def _vision(source: Source) -> tuple[VisionConfig, int]:
    """SigLIP's sizes and the side of its patches. The official code leaves the last layer out."""
    data, file = source.json("vit_config.json"), source.folder / "vit_config.json"
    if data.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f'{file}: hidden_act is "{data["hidden_act"]}", expected gelu_pytorch_tanh')
    config = _table(VisionConfig, data | {"num_hidden_layers": data.get("num_hidden_layers", 0) - 1}, file)
    patch = data.get("patch_size")
    if not isinstance(patch, int) or patch <= 0:
        raise UserError(f"{file}: patch_size is {patch!r}, expected a positive whole number")
    return config, patch


def _table(kind: Any, data: Mapping[str, Any], file: Path) -> Any:
    """The fields of `kind` that a foreign config has. Raises UserError for missing ones and wrong types."""
    return from_dict(kind, {k: v for k, v in data.items() if k in kind.__dataclass_fields__}, str(file))


def _tokens(source: Source, ids: Mapping[str, int] | None) -> tuple[Mapping[str, int], tuple[int, ...]]:
    """Ids of the structural tokens, and those of the question (none without a tokenizer)."""
    file = source.tokenizer_files().get(HUGGINGFACE_FILE)
    if not isinstance(file, Path):
        if ids is None:
            raise UserError(f"{source.folder}: holds no {HUGGINGFACE_FILE}: name one with --tokenizer")
        return ids, ()
    if ids is None:
        known = {t["content"]: t["id"] for t in read_json(file).get("added_tokens", [])}
        if missing := [name for name in TOKENS.values() if name not in known]:
            raise UserError(f"{file}: has no token {missing[0]}: use the tokenizer of the checkpoint")
        ids = {key: known[name] for key, name in TOKENS.items()}
    return ids, tuple(Tokenizer.load(file, special=NO_SPECIAL).encode(QUESTION))
