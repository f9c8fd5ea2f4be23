"""JanusFlow's configuration: the sizes of its parts, the ids of its tokens, the words around a user's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.autoencoder import AutoencoderConfig
from mlx_transfusion.models.convnext import ConvNextConfig
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.siglip import SiglipConfig


@dataclass(frozen=True)
class JanusFlowConfig:
    """Sizes of the parts, ids of the structural tokens, and the words around a user's."""

    text: LlamaConfig
    vision: SiglipConfig
    painting: ConvNextConfig
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    boi_token_id: int
    """Begins a picture to read; a learned vector stands in its place, so it is never embedded."""
    eoi_token_id: int
    """Ends a picture to read."""
    placeholder_token_id: int
    """Stands for a picture in the official tokenizer's text."""
    generation_token_id: int | None = None
    """Begins a picture to paint; the time stands in its place, so it is never read, and a tokenizer may lack it."""
    autoencoder: AutoencoderConfig | None = None
    """Of the latents; None for a model that only reads and writes."""
    prompt_format: str = "User: {prompt}\n\nAssistant:"
    """The text that is tokenised for a prompt to paint."""
    picture_before: tuple[int, ...] = ()
    """Tokens between BOS and a picture that is asked about: the system message, the opening of the user's turn."""
    question: tuple[int, ...] = ()
    """Tokens that ask for a description."""
    question_before: tuple[int, ...] = ()
    """Tokens between a picture and the question."""
    question_after: tuple[int, ...] = ()
    """Tokens behind the question: the opening of the answer."""
    model_type: str = "janusflow"

    def __post_init__(self) -> None:
        latents = self.painting.latent_channels
        if self.autoencoder is not None and self.autoencoder.latent_channels != latents:
            raise UserError(
                f"janusflow config: the autoencoder has {self.autoencoder.latent_channels} latent channels and the "
                f"model paints {latents}: use the autoencoder that it was trained with (stabilityai/sdxl-vae)"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the text head."""
        return self.text.vocab_size

    @cached_property
    def layout(self) -> Layout:
        """BOS and text; pictures are painted behind a prompt only, so no token opens one."""
        structural = (self.bos_token_id, self.pad_token_id, self.boi_token_id, self.eoi_token_id,
                      self.placeholder_token_id, self.generation_token_id)  # fmt: skip
        return Layout(
            bos=self.bos_token_id,
            eos=(self.eos_token_id,),
            pad=self.pad_token_id,
            banned=tuple(i for i in structural if i is not None),
            picture_tokens=max(1 + self.painting.grid**2, self.vision.patches + 2),
            max_position=self.text.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> JanusFlowConfig:
        """Read config.json strictly. Raises UserError for unknown or missing keys, wrong types and sizes."""
        return from_dict(cls, data, where)
