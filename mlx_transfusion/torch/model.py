"""The Transfusion model (arXiv 2408.11039) in PyTorch: twin of `models/transfusion.py`, with its parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from mlx_transfusion import trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.torch.attention import Attend, Mask, attend
from mlx_transfusion.torch.layers import Block, KeysValues, rope_angles
from mlx_transfusion.torch.patches import AngleEmbedding, PatchDecoder, PatchEncoder
from mlx_transfusion.torch.recompute import keep_products


class TrainArrays(NamedTuple):
    """What one training forward reads: packed rows of `sequence.PackedBatch` as tensors. M is at least 1."""

    ids: Tensor  # int64 [B, T]
    is_image: Tensor  # bool [B, T, 1]
    patch_row: Tensor  # int64 [B, T]
    patch_index: Tensor  # int64 [M*N]
    text_index: Tensor  # int64 [K]
    mask: Mask  # bool [B, 1, T, T] or a block mask
    patches: Tensor  # float32 [M, N, P], already noised
    angle: Tensor  # float32 [M]


class Transfusion(nn.Module):
    """Text embedding and head, patch encoder and decoder (linear or U-Net), and one transformer in between."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises UserError for a model with a painter or coordinates, which the MLX side alone trains."""
        super().__init__()
        if config.patch_positions == "coordinates":
            raise UserError(
                'a model with patch_positions "coordinates", which several picture sizes need, is trained by the MLX '
                "side alone: use another"
            )
        if config.painter:
            raise UserError("a model with a painter is trained by the MLX side alone: use one without")
        self.config = config
        self.checkpointing = 0
        """Recompute every n-th block in the backward pass (1: all of them, 0: none)."""
        self.keep_products = False
        """Of a block that is recomputed, keep the results of products and attention (`recompute.py`)."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.angle_embedding = AngleEmbedding(config, config.guidance_condition)
        self.patch_encoder = PatchEncoder(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patch_decoder = PatchDecoder(config)

    def forward(self, batch: TrainArrays) -> tuple[Tensor, Tensor]:
        """One pass over packed sequences.

        Returns the logits of the K text-loss positions [K, V] and the prediction for every patch [M, N, P].
        """
        m, n, _ = batch.patches.shape
        angle = self.angle_embedding(batch.angle)
        tokens, skips = self._patch_tokens(batch.patches, angle)
        x = torch.where(
            batch.is_image, tokens.reshape(m * n, -1)[batch.patch_row], self.embed_tokens(batch.ids)
        )
        places = torch.arange(x.shape[1], device=x.device)
        hidden, _ = self._run(x, batch.mask, places, [None] * len(self.layers))
        x = hidden.reshape(-1, hidden.shape[-1])
        patches = x[batch.patch_index].reshape(m, n, -1)
        return self.lm_head(x[batch.text_index]), self.patch_decoder(patches, batch.patches, angle, skips)

    # ---- distillation: pictures behind their prefixes -----------------------------------------------------------

    def read_prefix(self, ids: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """Read prompts [M, S] that are padded on the right: hidden states [M, S, D], keys and values a layer."""
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = (places[:, None] >= places)[None, None]
        return self._run(self.embed_tokens(ids), mask, places, [None] * len(self.layers))

    def paint(
        self,
        x: Tensor,
        angle: Tensor,
        prefix: Sequence[KeysValues],
        lengths: Tensor,
        guidance: Tensor | None = None,
        attention: Attend = attend,
    ) -> Tensor:
        """The prediction [M, N, P] for noisy patches [M, N, P] at angles [M], behind a read prefix.

        lengths [M] counts the prefix's real tokens; guidance: scales [M]. attention: its form.
        """
        embedded = self.angle_embedding(angle, guidance)
        n, columns = x.shape[1], prefix[0][0].shape[2]
        seen = torch.arange(columns, device=x.device) < lengths[:, None]
        own = seen.new_ones(n, n) if self.config.bidirectional else seen.new_ones(n, n).tril()
        mask = torch.cat([seen[:, None].expand(-1, n, -1), own.expand(len(x), n, n)], -1)[:, None]
        tokens, skips = self._patch_tokens(x, embedded)
        places = lengths[:, None, None] + torch.arange(n, device=x.device)
        hidden, _ = self._run(tokens, mask, places, prefix, attention)
        return self.patch_decoder(hidden, x, embedded, skips)

    def cos_velocity(self, x: Tensor, angle: Tensor, prefix: Sequence[KeysValues], lengths: Tensor) -> Tensor:
        """cos(angle) times the TrigFlow velocity [M, N, P], as `paint`: exact for either prediction."""
        out, per_patch = self.paint(x, angle, prefix, lengths), angle[:, None, None]
        if self.config.prediction == "velocity":
            return per_patch.cos() * out
        return trigflow.cos_velocity_from_eps(x, out, per_patch)

    def _patch_tokens(self, patches: Tensor, embedded: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token vectors [M, N, D] in the decoder's precision, and the encoder's skips."""
        tokens, skips = self.patch_encoder(patches, embedded)
        return tokens.to(self.norm.weight.dtype), skips

    def _run(
        self,
        x: Tensor,
        mask: Mask,
        places: Tensor,
        past: Sequence[KeysValues | None],
        attention: Attend = attend,
    ) -> tuple[Tensor, list[KeysValues]]:
        """The decoder on token vectors [B, T, D] at places [T] or [B, 1, T]: final hidden states, keys and values."""
        rope, added = rope_angles(self.config, places), []
        for i, (layer, before) in enumerate(zip(self.layers, past, strict=True)):
            if self.checkpointing and i % self.checkpointing == 0 and torch.is_grad_enabled():
                context = keep_products if self.keep_products else noop_context_fn
                x, new = checkpoint(
                    layer, x, mask, rope, before, attention, use_reentrant=False, context_fn=context
                )
            else:
                x, new = layer(x, mask, rope, before, attention)
            added.append(new)
        return self.norm(x), added
