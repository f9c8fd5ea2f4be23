"""The configuration of the model of discrete pictures (discrete.py). Imports no mlx."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_transfusion.config import check_heads, check_positive, check_special_ids, from_dict, one_of
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout

if TYPE_CHECKING:
    from mlx_transfusion.models.layers import Options

MODEL_TYPE = "discrete"
_POSITIVE = ("vocab_size", "codebook_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "image_height", "image_width", "rms_norm_eps", "rope_theta",
             "max_position")  # fmt: skip


@dataclass(frozen=True)
class DiscreteConfig:
    """A decoder for text tokens and picture codes alike (arXiv 2408.11039, section 4.2; arXiv 2405.09818).

    Fields that `config.ModelConfig` has too are named and meant as there.
    """

    vocab_size: int
    """Rows of the head: the tokenizer's, then one for each code."""
    codebook_size: int
    """Codes of the quantizer that cuts pictures up; the last so many ids of the vocabulary."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = MODEL_TYPE
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = True
    """Norms on queries and keys. On, and `post_norm` too, in the paper's baseline: without them the logits of such a
    model drift until it diverges (arXiv 2405.09818, 2.3)."""
    post_norm: bool = True
    """Norms behind attention and feed-forward layers instead of before them."""

    image_height: int = 32
    """Rows of codes of one picture."""
    image_width: int = 32

    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3
    boi_token_id: int = 4
    eoi_token_id: int = 5
    max_position: int = 4096
    """Longest sequence (text tokens and codes together) that generation accepts."""

    def __post_init__(self) -> None:
        one_of("hidden_act", self.hidden_act, ("silu", "relu"))
        check_positive(self, "model config", _POSITIVE)
        check_heads(self)
        if self.codebook_size >= self.vocab_size:
            raise UserError(
                f"model config: codebook_size {self.codebook_size} leaves no text in vocab_size {self.vocab_size}"
            )
        check_special_ids(self, self.first_code)

    @property
    def first_code(self) -> int:
        """Id of code 0: behind all ids of text."""
        return self.vocab_size - self.codebook_size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of all pictures that the model learns: one size."""
        return ((self.image_height, self.image_width),)

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of a picture's codes."""
        return size or self.sizes[0]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_image(self) -> int:
        """Number of codes N of one picture."""
        return self.image_height * self.image_width

    @property
    def bidirectional(self) -> bool:
        """Whether the codes of one picture all see each other: never, each is predicted from those before it."""
        return False

    @property
    def options(self) -> Options:
        """How its blocks differ from Transfusion's."""
        from mlx_transfusion.models.layers import Options

        return Options(post_norm=self.post_norm)

    @property
    def layout(self) -> Layout:
        """BOS, text, BOI codes EOI, text, EOS."""
        return Layout(
            bos=self.bos_token_id,
            eos=(self.eos_token_id,),
            boi=self.boi_token_id,
            eoi=self.eoi_token_id,
            pad=self.pad_token_id,
            unk=self.unk_token_id,
            banned=(self.pad_token_id, self.bos_token_id, self.unk_token_id, self.eoi_token_id),
            picture_tokens=self.patches_per_image + 2,
            picture_codes=self.patches_per_image,
            max_position=self.max_position,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> DiscreteConfig:
        """Read a config.json dict strictly; raises UserError for unknown or missing keys and wrong types."""
        return from_dict(cls, data, where)
