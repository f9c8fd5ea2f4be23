"""The configuration of a Llama that also paints (llama_painter.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.llama import LlamaConfig


@dataclass(frozen=True)
class LlamaPainterConfig(LlamaConfig):
    """A Llama's fields, those of its pictures, and the tokens around a prompt."""

    model_type: str = "llama_painter"
    image_height: int = 32
    image_width: int = 32
    patch_size: int = 8
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    image_std: float = 1.0
    time_frequencies: int = 32
    painter_rank: int = 0
    """0: layers of its own for pictures; else the rank of factors beside the text's layers."""
    painter_scale: float = 2.0
    """Factor of what the low-rank factors add."""
    painter_every: int = 1
    """Image tokens pass one layer for so many of the text's, the last of each group."""
    boi_token_id: int = 0
    """A token of the vocabulary that text never holds: begin of image."""
    eoi_token_id: int = 0
    """Another one: read behind a picture, which ends the answer."""
    prompt_before: tuple[int, ...] = ()
    """Tokens of the chat template before what the user says, and behind it."""
    prompt_after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.painter_rank < 0 or not 1 <= self.painter_every <= self.num_hidden_layers:
            raise UserError(
                f"llama_painter config: painter_rank is {self.painter_rank} and painter_every {self.painter_every}: "
                f"expected 0 or more, and 1 to {self.num_hidden_layers}"
            )
        if self.boi_token_id == self.eoi_token_id:
            raise UserError(
                "llama_painter config: boi_token_id and eoi_token_id are equal, expected two tokens"
            )
        special = (self.boi_token_id, self.eoi_token_id, *self.prompt_before, *self.prompt_after)
        if bad := [token for token in special if not 0 <= token < self.vocab_size]:
            raise UserError(
                f"llama_painter config: token id {bad[0]} is outside the vocabulary of {self.vocab_size}"
            )
        _ = self.pictures  # checks the sizes

    @cached_property
    def pictures(self) -> ModelConfig:
        """What the patch layers and the training data read of a config. Raises UserError for impossible sizes."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=self.intermediate_size,
            image_height=self.image_height,
            image_width=self.image_width,
            patch_size=self.patch_size,
            patch_positions="learned",
            patch_skip=True,
            time_frequencies=self.time_frequencies,
            image_mean=self.image_mean,
            image_std=self.image_std,
            pad_token_id=self.pad_token_id or 0,
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
        )

    @cached_property
    def layout(self) -> Layout:
        """Text as a Llama's; a picture stands between two tokens that text never holds."""
        text = super().layout
        return Layout(
            bos=text.bos,
            eos=text.eos,
            boi=self.boi_token_id,
            eoi=self.eoi_token_id,
            pad=text.pad,
            banned=tuple(sorted({*text.banned, self.eoi_token_id})),
            picture_tokens=self.pictures.patches_per_image + 2,
            max_position=text.max_position,
        )

    @property
    def painter_layers(self) -> range:
        """Which layers of the text those of the picture side stand beside."""
        step = self.painter_every
        return range(step - 1, self.num_hidden_layers, step)
