"""Pictures to token vectors and back in PyTorch: the twins of `models/patches.py`, with its parameter names.

Patches are in raster order; inside a patch the elements run row, column, channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.torch.unet import Skips, UNetDown, UNetUp


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, H, W, C] -> [B, N, patch_size*patch_size*C] with N = (H/p) * (W/p) in raster order."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Inverse of patchify: [B, N, P] -> [B, height, width, C]."""
    b, p = patches.shape[0], patch_size
    x = patches.reshape(b, height // p, width // p, p, p, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, -1)


def like(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on x in the precision of its weights: the angle's vector is float32 also in a bfloat16 model."""
    return layer(x.to(layer.weight.dtype))


class AngleEmbedding(nn.Module):
    """The noise angle in radians as a vector, always in float32 (models/patches.py says why it is smooth)."""

    def __init__(self, config: ModelConfig, guidance: bool = False) -> None:
        super().__init__()
        n = config.time_frequencies
        self.frequencies = n
        self.fc1 = nn.Linear(2 * n, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.guidance = nn.Linear(2 * n, config.hidden_size) if guidance else None

    def forward(self, angle: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Angles [B] in radians -> [B, D]; guidance: scales [B] of pictures that are being painted."""
        out = self.fc2(F.silu(self.fc1(self._waves(angle))))
        if guidance is None or self.guidance is None:
            return out
        return out + self.guidance(self._waves(guidance))

    def _waves(self, values: Tensor) -> Tensor:
        n = self.frequencies
        places = torch.arange(n, device=values.device, dtype=torch.float32) / max(1, n - 1)
        x = values[:, None] * 100.0**-places
        return torch.cat([x.cos(), x.sin()], -1)


class PatchEncoder(nn.Module):
    """Patches to token vectors: one linear layer, or a U-Net's way down; the angle embedding is added to each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = config.image_height, config.image_width, config.patch_size
        unet = config.patch_encoder == "unet"
        self.unet = UNetDown(config) if unet else None
        self.proj = None if unet else nn.Linear(config.patch_dim, config.hidden_size)
        size = config.patches_per_image, config.hidden_size
        self.position = nn.Parameter(torch.empty(size)) if config.patch_positions == "learned" else None

    def forward(self, patches: Tensor, angle: Tensor) -> tuple[Tensor, Skips]:
        """Noisy patches [B, N, P] and angle embedding [B, D] -> token vectors [B, N, D] and a U-Net's skips."""
        skips: Skips = ()
        if self.unet is not None:
            x, skips = self.unet(unpatchify(patches, *self.shape), angle)
        else:
            assert self.proj is not None
            x = like(self.proj, patches)
        x = x + angle[:, None]
        return (x if self.position is None else x + self.position), skips


class PatchDecoder(nn.Module):
    """Hidden states back to image elements: one linear layer, or a U-Net's way up; starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        unet = config.patch_encoder == "unet"
        self.unet = UNetUp(config) if unet else None
        self.proj = None if unet else nn.Linear(config.hidden_size, config.patch_dim)
        self.skip_gain = nn.Linear(config.hidden_size, config.patch_dim) if config.patch_skip else None

    def forward(self, hidden: Tensor, patches: Tensor, angle: Tensor, skips: Skips = ()) -> Tensor:
        """Hidden states [B, N, D] -> [B, N, P]; noisy patches [B, N, P], angle embedding [B, D], its skips."""
        if self.unet is not None:
            out = patchify(self.unet(hidden, angle, skips), self.patch_size)
        else:
            assert self.proj is not None
            out = self.proj(hidden)
        if self.skip_gain is None:
            return out
        return out + like(self.skip_gain, F.silu(angle))[:, None] * patches
