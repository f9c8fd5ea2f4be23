"""CLIP (arXiv 2103.00020): one vector of a picture and one of a text, near each other where they say the same.

OpenAI's vision transformers as Hugging Face stores them. Evaluation compares pictures and captions with it; language
models read its patches in another way (clip_vision.py).
Shapes: B pictures or texts, S x S pixels, T tokens, D width of a tower, P of the common space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.models.clip_vision import ClipVision, ClipVisionConfig
from mlx_transfusion.models.vision_layers import VisionConfig, VisionLayer, gelu_quick

MODEL_TYPE = "clip"


@dataclass(frozen=True)
class ClipTextConfig(VisionConfig):
    """Sizes of the text transformer, whose layers are those of the vision transformer."""

    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77

    def __post_init__(self) -> None:
        check_positive(self, "text config", ("vocab_size", "max_position_embeddings"))
        super().__post_init__()


@dataclass(frozen=True)
class ClipConfig:
    """Both towers and the space where they meet."""

    vision: ClipVisionConfig
    text: ClipTextConfig
    projection_dim: int = 512
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        check_positive(self, "CLIP config", ("projection_dim",))

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> ClipConfig:
        """Read that strictly. Raises UserError for unknown or missing keys and wrong types."""
        return from_dict(cls, data, where)


class ClipTextTower(nn.Module):
    """Tokens to hidden states, each seeing those before it."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, d)
        self.layers = [VisionLayer(config, gelu_quick) for _ in range(config.num_hidden_layers)]
        self.final_layer_norm = nn.LayerNorm(d, config.layer_norm_eps)

    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids [B, T] -> hidden states [B, T, D]."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, "causal")
        return self.final_layer_norm(x)


class Clip(nn.Module):
    """Both towers with their projections."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self._config = config
        # ClipVision counts a last layer that it does not keep; here all are needed.
        whole = replace(config.vision, num_hidden_layers=config.vision.num_hidden_layers + 1)
        self.vision = ClipVision(whole)
        self.post_layernorm = nn.LayerNorm(config.vision.hidden_size, config.vision.layer_norm_eps)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text = ClipTextTower(config.text)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)

    @property
    def config(self) -> ClipConfig:
        """The configuration the model was built from."""
        return self._config

    def embed_pictures(self, pixels: mx.array) -> mx.array:
        """Pixels [B, S, S, 3] in [0, 1] -> [B, P], of the class token behind the last layer."""
        states = self.vision.hidden_states(self.vision.normalise(pixels))
        return self.visual_projection(self.post_layernorm(states[-1][:, 0]))

    def embed_texts(self, ids: mx.array, lengths: mx.array) -> mx.array:
        """Token ids [B, T], padded on the right to `lengths` [B] -> [B, P], of the last token."""
        hidden = self.text(ids)
        return self.text_projection(hidden[mx.arange(len(ids)), lengths - 1])
