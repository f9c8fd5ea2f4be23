"""Mixed-modal sequences as data: Text | Image segments become packed, padded numpy arrays once.

The model, the losses and the PyTorch path all read these arrays; none of them looks at segments again.

Rules written down here (Transfusion, arXiv 2408.11039, section 3):

* a document is BOS, its segments, EOS; every image is wrapped as BOI, its N patches, EOI;
* attention is causal, bidirectional among the patches of the same image (unless the model's `image_attention`
  says otherwise), and never crosses a document or touches padding; a padding position sees itself alone, so that
  no query row is fully masked;
* the language-model loss predicts a text token from a text token. So there is no loss where the input is BOI
  (its successor is a patch), and none for EOI as a target: its predecessor is a patch, and the layout, not the
  model, decides how many patches an image has. EOI as an input does predict what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_transfusion.errors import UserError

PAD, TEXT, IMAGE = 0, 1, 2
"""Values of the `modality` array."""


@dataclass(frozen=True)
class Text:
    """A run of text tokens; `loss=False` keeps it in the context but out of the language-model loss."""

    ids: tuple[int, ...]
    loss: bool = True


@dataclass(frozen=True)
class Image:
    """One picture as `patches` tokens in raster order; `index` says which picture of the batch it is."""

    index: int
    patches: int


Segment = Text | Image


@dataclass(frozen=True)
class PackedBatch:
    """Arrays of B packed rows of T positions; M images of S patches in all; K (padded) text-loss positions."""

    ids: np.ndarray
    """Token ids, pad id at patches and padding. int32 [B, T]"""
    modality: np.ndarray
    """PAD, TEXT or IMAGE. int8 [B, T]"""
    image: np.ndarray
    """Index of the picture in the batch, -1 where there is none. int32 [B, T]"""
    document: np.ndarray
    """Index of the document in its row, -1 in padding. int32 [B, T]"""
    position: np.ndarray
    """Position inside the document, 0 in padding. int32 [B, T]"""
    patch_row: np.ndarray
    """Row of the stacked patches [S, P] that a patch position reads, 0 elsewhere. int32 [B, T]"""
    patch_index: np.ndarray
    """Flat position (row * T + column) of every stacked patch. int32 [S]"""
    text_index: np.ndarray
    """Flat positions whose next token is predicted; padded by 0. int32 [K]"""
    text_target: np.ndarray
    """The token that follows each of them. int32 [K]"""
    text_weight: np.ndarray
    """1 for a real entry, 0 for padding. float32 [K]"""

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return int((self.modality != PAD).sum())


class Marks(Protocol):
    """The ids that frame documents and pictures, of the config of a model that is trained here."""

    @property
    def bos_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def boi_token_id(self) -> int: ...

    @property
    def eoi_token_id(self) -> int: ...


def document(segments: Sequence[Segment], config: Marks) -> list[Segment]:
    """Wrap segments as a document: BOS first, BOI and EOI around each image, EOS last.

    >>> # caption first: BOS caption BOI patches EOI EOS
    """
    out: list[Segment] = [Text((config.bos_token_id,))]
    for segment in segments:
        if isinstance(segment, Image):
            out += [Text((config.boi_token_id,)), segment, Text((config.eoi_token_id,))]
        else:
            out.append(segment)
    return [*out, Text((config.eos_token_id,))]


def length(segments: Sequence[Segment]) -> int:
    """Number of positions the segments take."""
    return sum(s.patches if isinstance(s, Image) else len(s.ids) for s in segments)


def bucket(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple, at least one: `mx.compile` keeps one entry per shape, so shapes come in steps."""
    return max(1, -(-n // multiple)) * multiple


def first_fit(lengths: Sequence[int], row_length: int, longest_first: bool = True) -> list[list[int]]:
    """Put documents into rows of `row_length`, each into the first row with room, longest first or in their order.

    Returns the document numbers of each row. Deterministic. Raises UserError when one does not fit a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    order = (
        sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) if longest_first else range(len(lengths))
    )
    for i in order:
        if lengths[i] > row_length:
            raise UserError(
                f"a document of {lengths[i]} tokens does not fit a sequence of {row_length}; "
                "raise sequence_length or shorten the text"
            )
        r = next((r for r, free in enumerate(room) if lengths[i] <= free), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(row_length)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def pack(
    documents: Sequence[Sequence[Segment]],
    row_length: int,
    *,
    pad_id: int = 0,
    row_multiple: int = 1,
    text_multiple: int = 64,
    patches: Sequence[int] | None = None,
) -> PackedBatch:
    """Pack documents into rows of `row_length` by first fit, and lay them out.

    Raises UserError when a document is longer than a row.
    """
    rows = first_fit([length(d) for d in documents], row_length)
    return lay_out(
        documents, rows, row_length, pad_id=pad_id, row_multiple=row_multiple, text_multiple=text_multiple,
        patches=patches,
    )  # fmt: skip


def lay_out(
    documents: Sequence[Sequence[Segment]],
    rows: Sequence[Sequence[int]],
    row_length: int,
    *,
    pad_id: int = 0,
    row_multiple: int = 1,
    text_multiple: int = 64,
    patches: Sequence[int] | None = None,
) -> PackedBatch:
    """The arrays of documents whose rows are known: `rows` holds their numbers.

    Images must be numbered 0..M-1 by their `index`, each used once. patches: how many each of M stacked pictures has,
    where more are stacked than are used; an unused one's patches all point at position 0.
    Rows are padded to a multiple of `row_multiple`, text-loss positions to one of `text_multiple`.
    """
    if patches is None:
        found = sorted((s.index, s.patches) for d in documents for s in d if isinstance(s, Image))
        patches = [count for _, count in found]
    first = np.concatenate([[0], np.cumsum(patches)]).astype(int)  # where each picture's patches begin
    shape = (bucket(len(rows), row_multiple), row_length)
    ids = np.full(shape, pad_id, np.int32)
    modality = np.full(shape, PAD, np.int8)
    image = np.full(shape, -1, np.int32)
    doc = np.full(shape, -1, np.int32)
    position = np.zeros(shape, np.int32)
    patch_row = np.zeros(shape, np.int32)
    wanted = np.zeros(shape, bool)  # positions whose token may be a target of the language-model loss

    for r, members in enumerate(rows):
        at = 0
        for d, member in enumerate(members):
            start = at
            for segment in documents[member]:
                end = at + length([segment])
                if isinstance(segment, Image):
                    modality[r, at:end] = IMAGE
                    image[r, at:end] = segment.index
                    patch_row[r, at:end] = first[segment.index] + np.arange(segment.patches)
                else:
                    ids[r, at:end] = segment.ids
                    modality[r, at:end] = TEXT
                    wanted[r, at:end] = segment.loss
                at = end
            doc[r, start:at] = d
            position[r, start:at] = np.arange(at - start)

    flat_patch = np.flatnonzero(modality == IMAGE)
    patch_index = np.zeros(first[-1], np.int32)
    patch_index[patch_row.reshape(-1)[flat_patch]] = flat_patch
    text_index, text_target, text_weight = _text_loss(ids, modality, doc, wanted, text_multiple)
    return PackedBatch(
        ids, modality, image, doc, position, patch_row, patch_index, text_index, text_target, text_weight
    )


def _text_loss(
    ids: np.ndarray, modality: np.ndarray, doc: np.ndarray, wanted: np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, targets and weights of the language-model loss: text predicts text inside one document."""
    is_text = modality == TEXT
    predicts = is_text[:, :-1] & is_text[:, 1:] & (doc[:, :-1] == doc[:, 1:]) & wanted[:, 1:]
    row, column = np.nonzero(predicts)
    k = len(row)
    index, target = (np.zeros(bucket(k, multiple), np.int32) for _ in range(2))
    weight = np.zeros(len(index), np.float32)
    index[:k] = row * ids.shape[1] + column
    target[:k] = ids[row, column + 1]
    weight[:k] = 1.0
    return index, target, weight


def attention_mask(document: np.ndarray, image: np.ndarray, bidirectional: bool = True) -> np.ndarray:
    """Who may look at whom. bool [B, 1, T, T], True where query i sees key j.

    `document` and `image` are the arrays of PackedBatch, int32 [B, T]; bidirectional: a patch sees its whole image,
    else only what stands before it.
    """
    t = document.shape[1]
    causal = np.tril(np.ones((t, t), bool))
    same_document = (document[:, :, None] == document[:, None, :]) & (document[:, :, None] >= 0)
    same_image = (image[:, :, None] == image[:, None, :]) & (image[:, :, None] >= 0)
    mask = same_document & (causal | same_image if bidirectional else causal)
    return (mask | np.eye(t, dtype=bool))[:, None]
