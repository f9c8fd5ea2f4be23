"""What is measured of a trained model, item by item, so that intervals can be drawn over items and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.evaluation.array_file import ArrayFile, array_name
from mlx_transfusion.evaluation.cider import cider_d
from mlx_transfusion.evaluation.config import EvaluationConfig
from mlx_transfusion.evaluation.data import choose, load_texts, read_pairs
from mlx_transfusion.evaluation.denoising import BUCKET_EDGES, denoising_errors
from mlx_transfusion.evaluation.describing import describe_pictures
from mlx_transfusion.evaluation.distances import frechet, kernel_distance
from mlx_transfusion.evaluation.features import FeatureExtractor, extract
from mlx_transfusion.evaluation.measures import encode
from mlx_transfusion.evaluation.perplexity import described_document, score_documents, text_document
from mlx_transfusion.evaluation.retrieval import retrieve_captions, retrieve_pictures
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.text_to_image import generate_images

VELOCITY_ANGLES = (0.25, 1.45)
"""Radians: below, the error is mostly that of noise too weak to be seen; above, captions decide."""


@dataclass(frozen=True)
class About:
    """How a measure is shown."""

    title: str
    factor: float = 1.0
    more_is_better: bool = False
    nats: bool = False
    """A loss in nats, whose exponential is a perplexity."""


MEASURES = {
    "velocity": About("velocity error"),
    "picture": About("picture error at pi/2"),
    "frechet": About("Frechet distance"),
    "kernel": About("1000 x kernel distance", 1000.0),
    "retrieval": About("cosine with the right picture", more_is_better=True),
    "caption": About("nats a token, caption of a picture", nats=True),
    "cider": About("CIDEr-D of descriptions", more_is_better=True),
    "description": About("word F1 of descriptions", more_is_better=True),
    "text": About("nats a token, glosses", nats=True),
}
Result = dict[str, dict[str, Any]]
"""Name -> {"values": of each item, "weights": ...} or {"value": of the whole set}."""


def measure(loaded: Loaded, config: EvaluationConfig, extractor: FeatureExtractor, kept: Path) -> Result:
    """All measures on the validation data; the same items, noise and seeds for every model.

    kept: .npz file for the features of the real pictures, which are those of training.
    """
    return _losses(loaded, config) | _text(loaded, config) | _pictures(loaded, config, extractor, kept)


def _losses(loaded: Loaded, config: EvaluationConfig) -> Result:
    """The caption's loss behind the clean picture; of a diffusion model the picture's errors behind its caption."""
    model = loaded.trainable
    c = model.config
    pairs = read_pairs(config, config.val, *model.picture_size)
    chosen = choose(len(pairs), config.counts.losses, config.seed, "losses")
    patches = encode(loaded, pairs.pixels[chosen])
    ids = [loaded.tokenizer.encode(pairs.captions[i]) for i in chosen]
    after = score_documents(model, [described_document(t, k, c) for k, t in enumerate(ids)], patches)
    caption = {"caption": _items(after.nats / after.tokens, after.tokens)}
    if isinstance(model, Discrete):
        return caption
    captioned = [[c.bos_token_id, *i, c.boi_token_id] for i in ids]
    velocity, picture = denoising_errors(model, captioned, patches, seed=config.seed)
    low, high = (BUCKET_EDGES.index(a) for a in VELOCITY_ANGLES)
    return caption | {"velocity": _items(velocity[:, low:high].mean(1)), "picture": _items(picture[:, -1])}


def _text(loaded: Loaded, config: EvaluationConfig) -> Result:
    model = loaded.trainable
    texts = load_texts(config, config.val_texts, config.counts.texts)
    scores = score_documents(model, [text_document(loaded.tokenizer.encode(t), model.config) for t in texts])
    return {"text": _items(scores.nats / scores.tokens, scores.tokens)}


def _pictures(loaded: Loaded, config: EvaluationConfig, extractor: FeatureExtractor, kept: Path) -> Result:
    """Captions painted, as a set and one by one; pictures described."""
    size = loaded.trainable.picture_size
    val, train = read_pairs(config, config.val, *size), read_pairs(config, config.train, *size)
    chosen = choose(len(val), config.counts.pictures, config.seed, "pictures")
    settings = painting(loaded, config.generation).for_model(loaded.extra, loaded.name)
    made = generate_images(
        loaded, [val.captions[i] for i in chosen], [config.seed + int(i) for i in chosen], settings
    )
    pixels = np.stack([m.pixels for m in made])
    found = retrieve_pictures(pixels, chosen, val.pixels, val.family)
    rows = choose(len(train), config.counts.references, config.seed, "references")
    real = _real_features(train.pixels[rows], extractor, kept)
    features = extract(extractor, pixels)
    described = choose(len(val), config.counts.descriptions, config.seed, "descriptions")
    texts = describe_pictures(loaded, val.pixels[described], max_tokens=config.description_tokens)
    written = [[val.captions[i]] for i in described]
    return {
        "frechet": {"value": frechet(features, real)},
        "kernel": {"value": kernel_distance(features, real)},
        "retrieval": _items(found.cosine),
        "cider": _items(cider_d(texts, written)),
        "description": _items(retrieve_captions(texts, described, val.captions, val.family).word_f1),
    }


def painting(loaded: Loaded, generation: GenerationSettings) -> GenerationSettings:
    """The settings of evaluate.toml; a model that writes its pictures token by token has no sampler and steps."""
    if isinstance(loaded.trainable, Discrete):
        return dataclasses.replace(generation, sampler=None, steps=None)
    return generation


def _real_features(pixels: np.ndarray, extractor: FeatureExtractor, kept: Path) -> np.ndarray:
    name = array_name("features", {"extractor": extractor.fingerprint}, pixels)
    return ArrayFile(kept).get(name, lambda: extract(extractor, pixels))


def _items(values: np.ndarray, weights: Sequence[int] | np.ndarray | None = None) -> dict[str, Any]:
    """Rounded, for files that people may read."""
    out: dict[str, Any] = {"values": [float(f"{v:.5g}") for v in values]}
    return out if weights is None else out | {"weights": [int(w) for w in weights]}
