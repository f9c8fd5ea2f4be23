"""What a Show-o2 model's config.json holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.show_o2_head import HeadConfig
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.models.wan_vae import WanConfig


@dataclass(frozen=True)
class ShowO2Config:
    """Sizes of the parts, of pictures, and ids of the structural tokens."""

    text: LlamaConfig
    vision: VisionConfig
    head: HeadConfig
    autoencoder: WanConfig
    grid_height: int
    """Rows of latent patches of a picture, painted or read."""
    grid_width: int
    position_rows: int
    """Rows of the table of positions; where they are not those of the grid, the table is a square that is resized."""
    bos_token_id: int
    eos_token_id: int
    boi_token_id: int
    eoi_token_id: int
    pad_token_id: int | None = None
    patch_size: int = 2
    structural: tuple[int, ...] = ()
    """Further tokens that are never written: placeholders of pictures and films."""
    picture_before: tuple[int, ...] = ()
    """Tokens between BOS and a picture that is asked about: the system message, the opening of the user's turn."""
    question: tuple[int, ...] = ()
    """Tokens that ask for a description."""
    question_after: tuple[int, ...] = ()
    """Tokens behind the question: the opening of the answer."""
    model_type: str = "show_o2"

    def __post_init__(self) -> None:
        check_positive(self, "model config", ("grid_height", "grid_width", "position_rows", "patch_size"))
        if self.resizes_positions and isqrt(self.position_rows) ** 2 != self.position_rows:
            raise UserError(
                f"model config: position_rows is {self.position_rows}, expected those of the grid or a square"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the text head."""
        return self.text.vocab_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent patches."""
        return self.grid_height, self.grid_width

    @property
    def resizes_positions(self) -> bool:
        """Whether the table of positions is that of another grid."""
        return self.position_rows != self.grid_height * self.grid_width

    @property
    def latent_numbers(self) -> int:
        """Numbers P in a latent patch."""
        return self.autoencoder.z_dim * self.patch_size**2

    @cached_property
    def layout(self) -> Layout:
        """BOS, text, BOI, a token for the time, the picture, EOI, text, EOS."""
        structural = {self.bos_token_id, self.eoi_token_id, *self.structural}
        structural |= set() if self.pad_token_id is None else {self.pad_token_id}
        return Layout(
            bos=self.bos_token_id,
            eos=(self.eos_token_id,),
            boi=self.boi_token_id,
            eoi=self.eoi_token_id,
            pad=self.pad_token_id,
            banned=tuple(sorted(structural - {self.eos_token_id})),
            picture_tokens=3 + self.grid_height * self.grid_width,
            max_position=self.text.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> ShowO2Config:
        """Read config.json strictly. Raises UserError for unknown or missing keys, wrong types and sizes."""
        return from_dict(cls, data, where)
