"""How well the model predicts text: negative log-likelihoods, and the perplexities made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.evaluation.statistics import bootstrap_interval
from mlx_transfusion.losses import token_losses
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.sequence import Image, PackedBatch, Segment, Text
from mlx_transfusion.training.discrete_data import CodeTargets, code_targets

ROW_MULTIPLE = 16
"""Rows grow in steps of this many tokens."""


@dataclass(frozen=True)
class TextScores:
    """Losses of D documents."""

    nats: np.ndarray
    """-log P of the predicted tokens of each document. float64 [D]"""
    tokens: np.ndarray
    """How many were predicted. int [D]"""

    def summary(self, characters: int | None = None, seed: int = 0) -> dict[str, object]:
        """Nats and perplexity per token with a 95% interval, nats per document, and bits per character.

        characters: length of all the texts as they are written. Bits per character compare vocabularies;
        perplexities per token do not.
        """
        total, count = float(self.nats.sum()), int(self.tokens.sum())
        low, high = bootstrap_interval(self.nats, self.tokens, seed=seed)
        out: dict[str, object] = {
            "texts": len(self.nats),
            "tokens": count,
            "nats_per_token": total / count,
            "perplexity": math.exp(total / count),
            "perplexity_interval": [math.exp(low), math.exp(high)],
            "nats_per_text": total / len(self.nats),
        }
        if characters is not None:
            out["characters"] = characters
            out["bits_per_character"] = total / math.log(2) / characters
        return out


def text_document(ids: Sequence[int], config: ModelConfig | DiscreteConfig) -> list[Segment]:
    """BOS text EOS: every token of the text and EOS is predicted."""
    return sequence.document([Text(tuple(ids))], config)


def caption_document(ids: Sequence[int], config: ModelConfig | DiscreteConfig) -> list[Segment]:
    """BOS caption BOI: a caption before its picture. BOI, which ends the caption, is predicted with it."""
    return [Text((config.bos_token_id, *ids, config.boi_token_id))]


def described_document(ids: Sequence[int], image: int, config: ModelConfig | DiscreteConfig) -> list[Segment]:
    """BOS BOI picture EOI caption EOS: the caption and EOS, which ends it, are predicted from the picture."""
    return [
        Text((config.bos_token_id,)),
        Text((config.boi_token_id,), loss=False),
        Image(image, config.patches_per_image),
        Text((config.eoi_token_id,)),
        Text((*ids, config.eos_token_id)),
    ]


def score_documents(
    model: Transfusion | Discrete,
    documents: Sequence[Sequence[Segment]],
    patches: np.ndarray | None = None,
    *,
    batch_tokens: int = 4096,
) -> TextScores:
    """The language-model loss of each document; pictures are read clean (angle 0).

    patches: clean pictures [M, N, P], or codes [M, N]; the documents' images are numbered by its rows. Documents of
    similar length share a batch of at most about `batch_tokens` positions; results do not depend on it beyond
    rounding.
    """
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), int)
    for members, row_length in _batches(documents, batch_tokens):
        chosen, pictures = _renumber([documents[i] for i in members])
        packed = sequence.pack(chosen, row_length, pad_id=model.config.pad_token_id)
        values = _token_nats(model, packed, None if patches is None else patches[pictures])
        place = _document_of_target(chosen, packed)
        real = packed.text_weight > 0
        np.add.at(nats, np.array(members)[place[real]], values[real])
        np.add.at(tokens, np.array(members)[place[real]], 1)
    return TextScores(nats, tokens)


def _batches(documents: Sequence[Sequence[Segment]], batch_tokens: int) -> Iterator[tuple[list[int], int]]:
    """Document numbers of each batch, in order of length, with the length of its rows."""
    lengths = [sequence.length(d) for d in documents]
    batch: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: (lengths[i], i)):
        row = sequence.bucket(lengths[i], ROW_MULTIPLE)
        if batch and (len(batch) + 1) * row > batch_tokens:
            yield batch, sequence.bucket(lengths[batch[-1]], ROW_MULTIPLE)
            batch = []
        batch.append(i)
    if batch:
        yield batch, sequence.bucket(lengths[batch[-1]], ROW_MULTIPLE)


def _renumber(documents: Sequence[Sequence[Segment]]) -> tuple[list[list[Segment]], list[int]]:
    """The documents with their images numbered from 0, and which numbers those were."""
    out: list[list[Segment]] = []
    old: list[int] = []
    for document in documents:
        renumbered: list[Segment] = []
        for segment in document:
            if isinstance(segment, Image):
                old.append(segment.index)
                segment = Image(len(old) - 1, segment.patches)
            renumbered.append(segment)
        out.append(renumbered)
    return out, old


def _token_nats(model: Transfusion | Discrete, packed: PackedBatch, patches: np.ndarray | None) -> np.ndarray:
    """Cross-entropy of each text-loss position in nats, padding included. float64 [K]"""
    logits = _text_logits(model, packed, patches)
    nats = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(packed.text_target), reduction="none")
    return np.array(nats).astype(np.float64)


def _text_logits(model: Transfusion | Discrete, packed: PackedBatch, patches: np.ndarray | None) -> mx.array:
    """Logits of the text-loss positions [K, V]."""
    if isinstance(model, Discrete):
        codes = np.zeros((0, 1), int) if patches is None else patches
        targets = code_targets(packed, codes, model.config)
        return _logits_at(model, targets, targets.text_index)
    c = model.config
    patch_index = packed.patch_index
    if patches is None or not len(patches):
        # The model's one forward pass wants a picture; nothing reads this one.
        patches = np.zeros((1, c.patches_per_image, c.patch_dim), np.float32)
        patch_index = np.zeros(c.patches_per_image, np.int32)
    arrays = TrainArrays(
        ids=mx.array(packed.ids),
        is_image=mx.array((packed.modality == sequence.IMAGE)[..., None]),
        patch_row=mx.array(packed.patch_row),
        patch_index=mx.array(patch_index),
        text_index=mx.array(packed.text_index),
        mask=mx.array(sequence.attention_mask(packed.document, packed.image, c.bidirectional)),
        patches=mx.array(patches),
        angle=mx.zeros((len(patches),)),
    )
    return model(arrays)[0]


def code_scores(
    model: Discrete, captions: Sequence[Sequence[int]], codes: np.ndarray, *, batch_size: int = 64
) -> TextScores:
    """The loss of each picture's codes [M, N], behind its caption (token ids, or nothing) and BOI."""
    c, nats = model.config, np.zeros(len(codes))
    for start in range(0, len(codes), batch_size):
        rows = range(start, min(start + batch_size, len(codes)))
        documents = [[*caption_document(captions[i], c), Image(i - start, c.patches_per_image)] for i in rows]
        length = sequence.bucket(max(map(sequence.length, documents)), ROW_MULTIPLE)
        targets = code_targets(
            sequence.pack(documents, length, pad_id=c.pad_token_id), codes[rows.start : rows.stop], c
        )
        logits = _logits_at(model, targets, targets.code_index).astype(mx.float32)
        loss, _ = token_losses(logits, mx.array(targets.code_target))
        nats[rows.start : rows.stop] = np.array(loss).reshape(len(rows), -1).sum(1)
    return TextScores(nats, np.full(len(codes), c.patches_per_image))


def _logits_at(model: Discrete, targets: CodeTargets, index: np.ndarray) -> mx.array:
    hidden = model(mx.array(targets.ids), mx.array(targets.mask))
    return model.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(index)])


def _document_of_target(documents: Sequence[Sequence[Segment]], packed: PackedBatch) -> np.ndarray:
    """Which of the packed documents each text-loss position belongs to. int [K]"""
    width = packed.ids.shape[1]
    rows = sequence.first_fit([sequence.length(d) for d in documents], width)
    row, column = np.divmod(packed.text_index, width)
    number = packed.document[row, column]
    # Padding entries point at position 0, which may be of any document; their weight is 0.
    return np.array([rows[r][max(d, 0)] for r, d in zip(row, number, strict=True)], int)
