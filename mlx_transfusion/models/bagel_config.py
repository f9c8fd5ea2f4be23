"""What a BAGEL model's config.json holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.bagel_layers import BagelTextConfig
from mlx_transfusion.models.vision_layers import VisionConfig


@dataclass(frozen=True)
class BagelConfig:
    """Sizes of the parts, of the pictures that are painted and read, and ids of the structural tokens."""

    text: BagelTextConfig
    vision: VisionConfig
    autoencoder: AutoencoderConfig
    vision_patch_size: int
    vision_table_side: int
    """Most patches along a side of a picture that is read; so wide are its two tables of positions."""
    latent_table_side: int
    """Most latent patches along a side of a picture that is painted."""
    bos_token_id: int
    """Begins every block of text, and what the model writes."""
    eos_token_id: int
    boi_token_id: int
    """Stands before a picture, painted or read, at the picture's own position."""
    eoi_token_id: int
    image_height: int
    """Of the pictures that are painted, in pixels; any multiple of `stride` up to the table's side."""
    image_width: int
    input_height: int
    """That a user's picture is brought to; any multiple of `vision_patch_size` up to the table's side."""
    input_width: int
    latent_patch_size: int = 2
    question: tuple[int, ...] = ()
    """Tokens that ask for a description of a picture."""
    model_type: str = "bagel"

    def __post_init__(self) -> None:
        self._check_size("image", self.stride, self.latent_table_side)
        self._check_size("input", self.vision_patch_size, self.vision_table_side)

    def _check_size(self, name: str, stride: int, most: int) -> None:
        for side in ("height", "width"):
            value = getattr(self, f"{name}_{side}")
            if value <= 0 or value % stride or value > stride * most:
                raise UserError(
                    f"model config: {name}_{side} is {value}, expected a multiple of {stride} up to {stride * most}"
                )

    @property
    def vocab_size(self) -> int:
        """Rows of the text head."""
        return self.text.vocab_size

    @property
    def stride(self) -> int:
        """Pixels along the side of a latent patch."""
        return self.latent_patch_size * self.autoencoder.factor

    @property
    def latent_numbers(self) -> int:
        """Numbers P in a latent patch."""
        return self.autoencoder.latent_channels * self.latent_patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent patches of a painted picture."""
        return self.image_height // self.stride, self.image_width // self.stride

    @cached_property
    def layout(self) -> Layout:
        """Blocks of text and of pictures. No token opens a picture: its begin and end belong to the picture."""
        read = (self.input_height // self.vision_patch_size) * (self.input_width // self.vision_patch_size)
        painted = self.grid[0] * self.grid[1]
        return Layout(
            bos=self.bos_token_id,
            bos_before_pictures=False,
            eos=(self.eos_token_id,),
            banned=(self.bos_token_id, self.boi_token_id, self.eoi_token_id),
            picture_tokens=max(read, painted) + 2,
            max_position=self.text.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> BagelConfig:
        """Read config.json strictly. Raises UserError for unknown or missing keys, wrong types and sizes."""
        return from_dict(cls, data, where)
