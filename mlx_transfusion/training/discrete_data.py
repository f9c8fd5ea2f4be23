"""Training data of a model of discrete pictures: the same rows and draws, with a picture's codes in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.picture_sizes import Size
from mlx_transfusion.sequence import IMAGE, PackedBatch, attention_mask
from mlx_transfusion.training.config import SourceConfig
from mlx_transfusion.training.data import Batch, DataSet, Document, Pictures
from mlx_transfusion.training.latents import CODES, LatentFiles


class CodeData(DataSet):
    """Rows whose pictures are the codes that an autoencoder made of them.

    A picture's noise angle is drawn as ever, so that the documents are those of a diffusion model with this seed; all
    that counts of it is that 0 marks a picture which is given and not learned.
    """

    def __init__(self, sources: Sequence[SourceConfig], *, model: DiscreteConfig, **keywords: Any) -> None:
        """As DataSet. Raises UserError for files of codes of another size."""
        self._codes = model
        super().__init__(sources, model=model, **keywords)  # type: ignore[arg-type]

    def _open_pictures(self) -> dict[Size, LatentFiles]:
        c, files = self._codes, self._data.latents
        if not files:
            raise UserError(
                f'[model]: one of type "{c.model_type}" learns the codes of an autoencoder: encode the data set with '
                "one that has a codebook, and name the file in data.latents"
            )
        size = c.image_height, c.image_width
        return {size: LatentFiles(files, size, CODES)}

    def pictures(self, documents: Sequence[Document], size: Size | None = None) -> Pictures:
        """The codes of some documents' pictures, int32 [M, h, w], in the place of pixels; there is no noise.

        Raises UserError for a code that the model has no place for.
        """
        refs = [ref for d in documents for ref in d.images]
        flips = [one for d in documents for one in d.flips]
        angles = np.array([a for d in documents for a in d.angles], np.float32)
        codes = self._pixels[self._model.sizes[0]].load(refs, flips)
        if codes.max(initial=0) >= self._codes.codebook_size:
            raise UserError(
                f"{self._data.latents[0]}: has code {codes.max()}, and [model] has a codebook_size of "
                f"{self._codes.codebook_size}: use the size of the autoencoder's codebook"
            )
        return Pictures(codes, np.zeros((0,), np.float32), angles)


@dataclass(frozen=True)
class CodeTargets:
    """Which tokens of packed rows are predicted, from which positions.

    Text predicts text, as in a diffusion model (sequence.py), so that both are measured on the same tokens. Beside
    that every code is predicted from the token before it, the first one from BOI. EOI is not: the layout says where a
    picture ends.
    """

    ids: np.ndarray
    """Text tokens and codes. int32 [B, T]"""
    mask: np.ndarray
    """Causal, never across documents. bool [B, 1, T, T]"""
    text_index: np.ndarray
    """Flat positions whose next token is text, int32 [K], what it is, and 1 or, for padding, 0."""
    text_target: np.ndarray
    text_weight: np.ndarray
    code_index: np.ndarray
    """Those whose next token is a code, int32 [M*N], which, and 0 where the picture is only given."""
    code_target: np.ndarray
    code_weight: np.ndarray


def code_targets(
    packed: PackedBatch, codes: np.ndarray, config: DiscreteConfig, learned: np.ndarray | None = None
) -> CodeTargets:
    """Rows in which the pictures' places hold `codes` [M, h, w] or [M, N]; learned: which pictures are, bool [M]."""
    flat = codes.reshape(-1) + config.first_code
    weight = np.ones(len(codes)) if learned is None else learned
    ids = packed.ids.copy()
    if len(flat):
        ids = np.where(packed.modality == IMAGE, flat[packed.patch_row], ids)
    return CodeTargets(
        ids.astype(np.int32),
        attention_mask(packed.document, packed.image, bidirectional=False),
        packed.text_index,
        packed.text_target,
        packed.text_weight,
        packed.patch_index - 1,
        flat.astype(np.int32),
        np.repeat(weight, config.patches_per_image).astype(np.float32),
    )


def targets_of(batch: Batch, config: DiscreteConfig) -> CodeTargets:
    """The targets of a batch of `CodeData`."""
    return code_targets(batch.packed, batch.pixels, config, batch.angle > 0)
