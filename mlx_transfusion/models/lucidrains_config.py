"""The configuration of a transfusion-pytorch model (lucidrains.py), and the ids that follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_transfusion.config import check_positive, from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig

TEXT_MARKS, CHARACTERS = 3, 128
"""Begin, end and null text; and ASCII, in which the model writes the shape of a picture."""


@dataclass(frozen=True)
class ModalityConfig:
    """One kind of latents that the model makes besides text."""

    dim_latent: int
    channel_first: bool = False
    """How the package's own functions take them. Ours take channels last; it decides names of tensors alone."""
    axial_positions: bool = False
    axes: int | None = None
    """Number of axes, needed for axial positions."""
    shape: tuple[int, ...] | None = None
    """Tokens along each axis of what is painted without being told a shape."""


@dataclass(frozen=True)
class LucidrainsConfig:
    """The package's constructor arguments, as far as they change what a model computes."""

    num_text_tokens: int
    dim: int
    depth: int
    ff_inner: int
    """Numbers between the two matrices of a feed-forward layer."""
    modalities: tuple[ModalityConfig, ...]
    model_type: str = "transfusion_pytorch"
    dim_head: int = 64
    heads: int = 8
    unet_skips: bool = True
    value_residual: bool = False
    qk_norm: bool = True
    gates: bool = True
    """Each head's output times a sigmoid of its own input."""
    softcap: float = 50.0
    """Scores s become softcap * tanh(s / softcap)."""
    laser: bool = False
    """Attention over exponentials of the values (arXiv 2411.03493)."""
    laser_softcap: float = 15.0
    clean_output: bool = False
    """The network's output stands for the data, not for the flow."""
    clean_eps: float = 1e-2
    """Least 1 - t that such an output is divided by."""
    painted: int = 0
    """Which of the modalities are the pictures; two axes."""
    patch_size: int = 1
    """Elements on a side of a token: latents are pixels in [-1, 1], or what the autoencoder makes of them, cut into
    patches (row, column, channel)."""
    autoencoder: AutoencoderConfig | None = None
    max_position: int = 2048

    def __post_init__(self) -> None:
        check_positive(
            self, "model config",
            ("dim", "depth", "dim_head", "heads", "ff_inner", "softcap", "laser_softcap",
             "clean_eps", "patch_size", "max_position"),
        )  # fmt: skip
        if self.num_text_tokens < 0:
            raise UserError(
                f"model config: num_text_tokens is {self.num_text_tokens}, expected 0 or a positive number"
            )
        if self.dim % 2 or self.dim_head % 2:
            raise UserError(f"model config: dim {self.dim} and dim_head {self.dim_head} must be even")
        if not 0 <= self.painted < len(self.modalities):
            raise UserError(
                f"model config: painted is {self.painted}, expected one of the {len(self.modalities)} modalities"
            )
        for i, modality in enumerate(self.modalities):
            self._check_modality(modality, f"model config: modalities[{i}]")
        channels, rest = divmod(self.modalities[self.painted].dim_latent, self.patch_size**2)
        if rest:
            raise UserError(
                f"model config: dim_latent {self.modalities[self.painted].dim_latent} is no number of channels times "
                f"patch_size {self.patch_size} squared"
            )
        if self.autoencoder is not None and self.autoencoder.latent_channels != channels:
            raise UserError(
                f"model config: the autoencoder has {self.autoencoder.latent_channels} latent channels and the model "
                f"paints {channels}: use the one it was trained with"
            )

    def _check_modality(self, modality: ModalityConfig, where: str) -> None:
        if modality.dim_latent < 1:
            raise UserError(f"{where}: dim_latent is {modality.dim_latent}, expected a positive number")
        if modality.axial_positions and not modality.axes:
            raise UserError(f"{where}: axial_positions need axes")
        if modality.shape is not None and (min(modality.shape, default=0) < 1):
            raise UserError(f"{where}: shape is {list(modality.shape)}, expected positive numbers")
        if modality.shape is not None and modality.axes not in (None, len(modality.shape)):
            raise UserError(f"{where}: shape {list(modality.shape)} does not have {modality.axes} axes")

    # ---- ids: text, begin, end, null, one begin and one end for each modality, meta, the characters ------------

    @property
    def sos_id(self) -> int:
        """Begin of a document; end and null text follow."""
        return self.num_text_tokens

    @property
    def null_id(self) -> int:
        """Stands for every token of a prompt that guidance leads away from."""
        return self.num_text_tokens + 2

    def som_id(self, kind: int) -> int:
        """Begin of a modality."""
        return self.num_text_tokens + TEXT_MARKS + kind

    def eom_id(self, kind: int) -> int:
        """End of a modality."""
        return self.som_id(kind) + len(self.modalities)

    @property
    def meta_id(self) -> int:
        """Before the shape's characters."""
        return self.som_id(0) + 2 * len(self.modalities)

    @property
    def vocab_size(self) -> int:
        """Rows of the text head."""
        return self.meta_id + 1 + CHARACTERS

    @property
    def marks(self) -> list[str]:
        """Names of all tokens behind the text's, in their order."""
        kinds = range(len(self.modalities))
        return [
            "<|sos|>", "<|eos|>", "<|null|>", *(f"<|som {i}|>" for i in kinds), *(f"<|eom {i}|>" for i in kinds),
            "<|meta|>", *(f"<|character {i}|>" for i in range(CHARACTERS)),
        ]  # fmt: skip

    def opening(self, kind: int, shape: tuple[int, ...]) -> list[int]:
        """What stands before the tokens of a modality of that shape: meta, "h,w" in characters, begin."""
        characters = [self.meta_id + 1 + ord(c) for c in ",".join(map(str, shape))]
        return [self.meta_id, *characters, self.som_id(kind)]

    @property
    def picture_shape(self) -> tuple[int, int]:
        """Tokens (rows, columns) of a picture. Raises UserError for a model without pictures of a known shape."""
        shape = self.modalities[self.painted].shape
        if shape is None or len(shape) != 2:
            raise UserError(
                f"this model's modality {self.painted} has no default shape of two axes and is no picture: give "
                "the config a shape, or use the model's plain functions"
            )
        return shape[0], shape[1]

    @property
    def layout(self) -> Layout:
        """BOS, text, meta and shape, begin picture end, EOS.

        A shape is written like text, and every picture painted has the default one, as in the package.
        """
        shape = self.modalities[self.painted].shape or ()
        boi, eos = self.som_id(self.painted), self.sos_id + 1
        return Layout(
            bos=self.sos_id,
            eos=(eos,),
            boi=boi,
            eoi=self.eom_id(self.painted),
            banned=(self.sos_id, self.null_id, *(i for i in range(self.som_id(0), self.meta_id) if i != boi)),
            picture_tokens=prod(shape) + len(self.opening(self.painted, shape)) + 1,
            max_position=self.max_position,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> LucidrainsConfig:
        """Read config.json strictly. Raises UserError for unknown or missing keys, wrong types and sizes."""
        return from_dict(cls, data, where)
