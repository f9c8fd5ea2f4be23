"""The four measurements of a model, each a plain dict for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transfusion.evaluation.baselines import LanguageModel, document_nats, fit_bigram, fit_unigram
from mlx_transfusion.evaluation.cider import cider_d
from mlx_transfusion.evaluation.config import EvaluationConfig
from mlx_transfusion.evaluation.data import Pairs, choose
from mlx_transfusion.evaluation.denoising import BUCKET_EDGES, denoising_errors
from mlx_transfusion.evaluation.describing import describe_pictures
from mlx_transfusion.evaluation.features import extract
from mlx_transfusion.evaluation.networks import ClipFeatures
from mlx_transfusion.evaluation.perplexity import (
    TextScores,
    caption_document,
    code_scores,
    described_document,
    score_documents,
    text_document,
)
from mlx_transfusion.evaluation.picture_text import picture_text
from mlx_transfusion.evaluation.retrieval import retrieve_captions, retrieve_pictures
from mlx_transfusion.evaluation.statistics import bootstrap_interval
from mlx_transfusion.events import Step
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.text_to_image import generate_images

Progress = Callable[[int, int], None]
"""progress(done, total)"""

PATCH_BATCH = 256


@dataclass(frozen=True)
class Split:
    """What is asked for, and what it is looked for among."""

    name: str
    pairs: Pairs
    references: Pairs
    """They hold `pairs` as well, from the row `offset` on."""
    offset: int


def measure_pictures(
    loaded: Loaded,
    config: EvaluationConfig,
    split: Split,
    progress: Progress,
    clip: ClipFeatures | None = None,
) -> dict[str, Any]:
    """Paint captions of the split and look for each picture among its references.

    Caption i is painted with the seed config.seed + i, whatever else is painted. clip: compares the pictures with
    their captions as well, and the references beside them.
    """
    pairs, references = split.pairs, split.references
    chosen = choose(len(pairs), config.counts.pictures, config.seed, "pictures")
    evaluations = 0

    def on_step(step: Step) -> None:
        nonlocal evaluations
        evaluations += len(step.indices)
        progress(evaluations, len(chosen) * step.steps)

    made = generate_images(
        loaded,
        [pairs.captions[i] for i in chosen],
        [config.seed + int(i) for i in chosen],
        config.generation,
        on_step,
    )
    own = chosen + split.offset
    painted = np.stack([m.pixels for m in made])
    result = retrieve_pictures(painted, own, references.pixels, references.family)
    items = [
        {
            "caption": references.captions[o],
            "nearest": references.captions[n],
            "exact": bool(e),
            "variant": bool(v),
            "cosine": round(float(c), 4),
            "rank": float(r),
        }
        for o, n, e, v, c, r in zip(
            own, result.nearest, result.exact, result.variant, result.cosine, result.rank, strict=True
        )
    ]
    out = {
        "count": len(chosen),
        "references": len(references),
        "exact": rate(result.exact, result.exact_chance, config.seed),
        "variant": rate(result.variant, result.variant_chance, config.seed),
        "mean_cosine": float(result.cosine.mean()),
        "mean_rank": float(result.rank.mean()),
        "median_rank": float(np.median(result.rank)),
        "items": items,
    }
    if clip is not None:
        captions = [pairs.captions[i] for i in chosen]
        texts = clip.texts(captions)
        for name, pixels in (("clip", painted), ("clip_of_references", pairs.pixels[chosen])):
            out[name] = picture_text(extract(clip, pixels), texts, captions, config.seed)
    return out


def measure_descriptions(
    loaded: Loaded, config: EvaluationConfig, split: Split, progress: Progress
) -> dict[str, Any]:
    """Describe pictures of the split and look for each text among the captions of its references."""
    pairs, references = split.pairs, split.references
    chosen = choose(len(pairs), config.counts.descriptions, config.seed, "descriptions")
    texts = describe_pictures(
        loaded, pairs.pixels[chosen], max_tokens=config.description_tokens, progress=progress
    )
    own = chosen + split.offset
    result = retrieve_captions(texts, own, references.captions, references.family)
    items = [
        {
            "caption": references.captions[o],
            "description": text,
            "nearest": references.captions[n] if n >= 0 else None,
            "match": bool(m),
            "right": bool(r),
            "variant": bool(v),
        }
        for o, text, n, m, r, v in zip(
            own, texts, result.nearest, result.match, result.right, result.variant, strict=True
        )
    ]
    written = [
        [c for n, c in zip(pairs.names, pairs.captions, strict=True) if n == pairs.names[i]] for i in chosen
    ]
    cider = cider_d(texts, written)
    return {
        "count": len(chosen),
        "references": len(references),
        "cider_d": float(cider.mean()),
        "cider_d_interval": list(bootstrap_interval(cider, seed=config.seed)),
        "match": rate(result.match, result.right_chance, config.seed),
        "right": rate(result.right, result.right_chance, config.seed),
        "variant": rate(result.variant, result.variant_chance, config.seed),
        "mean_word_f1": float(result.word_f1.mean()),
        "items": items,
    }


def measure_text(
    loaded: Loaded, config: EvaluationConfig, train: Sequence[str], val: Sequence[str]
) -> dict[str, Any]:
    """Perplexity of the model and of the n-gram baselines on the same tokens of the validation texts."""
    model = loaded.trainable
    c = model.config
    vocabulary = loaded.tokenizer.vocab_size
    characters = sum(map(len, val))
    val_ids = [loaded.tokenizer.encode(text) for text in val]
    scores = {"model": score_documents(model, [text_document(ids, c) for ids in val_ids])}
    documents = [_framed(loaded, loaded.tokenizer.encode(text)) for text in train]
    held_out = [_framed(loaded, ids) for ids in val_ids]
    baselines: dict[str, LanguageModel] = {
        "unigram": fit_unigram(documents, vocabulary),
        "bigram": fit_bigram(documents, vocabulary),
    }
    for name, baseline in baselines.items():
        scores[name] = TextScores(document_nats(baseline, held_out), scores["model"].tokens)
    out: dict[str, Any] = {name: s.summary(characters, config.seed) for name, s in scores.items()}
    out["unigram"]["pseudo_count"] = baselines["unigram"].parameter
    out["bigram"]["discount"] = baselines["bigram"].parameter
    return out | {"vocabulary": vocabulary, "training_texts": len(train)}


def measure_losses(loaded: Loaded, config: EvaluationConfig, split: Split) -> dict[str, Any]:
    """Losses of captioned pictures: of the caption in either order, of the picture by amount of noise or by code."""
    model = loaded.trainable
    c = model.config
    pairs = split.pairs
    chosen = choose(len(pairs), config.counts.losses, config.seed, "losses")
    patches = encode(loaded, pairs.pixels[chosen])
    ids = [loaded.tokenizer.encode(pairs.captions[i]) for i in chosen]
    before = score_documents(model, [caption_document(i, c) for i in ids])
    after = score_documents(model, [described_document(t, k, c) for k, t in enumerate(ids)], patches)
    losses = {
        "count": len(chosen),
        "caption_before_picture": before.summary(seed=config.seed),
        "caption_after_picture": after.summary(seed=config.seed),
    }
    if isinstance(model, Discrete):
        prompts: dict[str, Sequence[Sequence[int]]]
        prompts = {"with_caption": ids, "without_caption": [[]] * len(ids)}
        codes = {name: code_scores(model, text, patches) for name, text in prompts.items()}
        return losses | {"codes": {name: scores.summary(seed=config.seed) for name, scores in codes.items()}}
    captioned = [[c.bos_token_id, *i, c.boi_token_id] for i in ids]
    bare = [[c.bos_token_id, c.boi_token_id]] * len(ids)
    return losses | {
        "denoising": {
            "angle_buckets": [[a, b] for a, b in pairwise(BUCKET_EDGES)],
            "with_caption": _denoising(loaded, captioned, patches, config.seed),
            "without_caption": _denoising(loaded, bare, patches, config.seed),
        },
    }


def _denoising(
    loaded: Loaded, prefixes: Sequence[Sequence[int]], patches: np.ndarray, seed: int
) -> dict[str, Any]:
    velocity, picture = denoising_errors(loaded.transfusion, prefixes, patches, seed=seed)
    return {
        "velocity_error": velocity[:, :-1].mean(0).tolist(),
        "picture_error": picture[:, :-1].mean(0).tolist(),
        "picture_error_at_noise": float(picture[:, -1].mean()),
        "picture_error_at_noise_interval": list(bootstrap_interval(picture[:, -1], seed=seed)),
    }


def rate(right: np.ndarray, chance: float, seed: int) -> dict[str, Any]:
    """Share of right answers, its 95% bootstrap interval, and what chance gives."""
    return {
        "rate": float(right.mean()),
        "interval": list(bootstrap_interval(right.astype(float), seed=seed)),
        "chance": chance,
    }


def encode(loaded: Loaded, pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels [M, H, W, 3] -> clean patches [M, N, P] float32, or codes [M, N]."""
    parts = [
        np.array(loaded.pictures.encode(mx.array(pixels[at : at + PATCH_BATCH]).astype(mx.float32) / 255))
        for at in range(0, len(pixels), PATCH_BATCH)
    ]
    return np.concatenate(parts)


def _framed(loaded: Loaded, ids: Sequence[int]) -> np.ndarray:
    """BOS text EOS, the tokens of `text_document`. int [T]"""
    c = loaded.trainable.config
    return np.array([c.bos_token_id, *ids, c.eos_token_id])
