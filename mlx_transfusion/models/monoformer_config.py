"""The configuration of a MonoFormer (monoformer.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.clip_vision import ClipVisionConfig


@dataclass(frozen=True)
class MonoFormerConfig:
    """Llama's sizes, the latent's, and the ids of the structural tokens."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    image_token_id: int
    """Stands for a picture in the official tokenizer's text; never embedded."""
    boi_token_id: int
    eoi_token_id: int
    model_type: str = "monoformer"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    latent_size: int = 32
    """Height and width of the latent picture."""
    latent_channels: int = 4
    patch_size: int = 2
    position_sines: bool = True
    picture_attention: bool = True
    """Patches see each other; False: causal, as an ablation of the paper."""
    prompt_format: str = "Please generate an image of {prompt}."
    """The text that is tokenised for a prompt to paint, as in training."""
    vision: ClipVisionConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    """Without one the model paints latents, which nothing here makes a picture of."""

    hidden_act = "silu"
    qk_norm = False

    def __post_init__(self) -> None:
        check_positive(
            self, "model config",
            ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size", "rms_norm_eps", "rope_theta",
             "max_position_embeddings", "latent_size", "latent_channels", "patch_size"),
        )  # fmt: skip
        if self.num_attention_heads % self.num_key_value_heads or self.hidden_size % (
            2 * self.num_attention_heads
        ):
            raise UserError(
                f"model config: hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}, and that a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_size % 4 or self.latent_size % self.patch_size:
            raise UserError(
                f"model config: hidden_size {self.hidden_size} must be a multiple of 4, and latent_size "
                f"{self.latent_size} of patch_size {self.patch_size}"
            )
        if self.autoencoder is not None and self.autoencoder.latent_channels != self.latent_channels:
            raise UserError(
                f"model config: the autoencoder has {self.autoencoder.latent_channels} latent channels and the model "
                f"paints {self.latent_channels}: use the one it was trained with (stabilityai/sd-vae-ft-mse)"
            )
        if "{prompt}" not in self.prompt_format:
            raise UserError('model config: prompt_format must hold "{prompt}"')

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches on a side of the picture."""
        return self.latent_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers P of a patch."""
        return self.latent_channels * self.patch_size**2

    @property
    def layout(self) -> Layout:
        """BOS, text, BOI picture EOI, EOS."""
        return Layout(
            bos=self.bos_token_id,
            eos=(self.eos_token_id,),
            boi=self.boi_token_id,
            eoi=self.eoi_token_id,
            pad=self.pad_token_id,
            banned=(self.bos_token_id, self.pad_token_id, self.image_token_id, self.eoi_token_id),
            picture_tokens=3 + max(self.grid**2, self.vision.patches if self.vision else 0),
            max_position=self.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> MonoFormerConfig:
        """Read config.json strictly. Raises UserError for unknown or missing keys, wrong types and sizes."""
        return from_dict(cls, data, where)
