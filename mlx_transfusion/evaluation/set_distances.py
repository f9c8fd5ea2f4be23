"""`evaluate --frechet`: how far painted pictures are from real ones as sets, of one model or of two."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.array_file import ArrayFile, array_name, chunks
from mlx_transfusion.evaluation.config import EvaluationConfig, load_config
from mlx_transfusion.evaluation.data import Pairs, choose, read_pairs, shuffled
from mlx_transfusion.evaluation.distances import compare_sets, frechet, kernel_distance
from mlx_transfusion.evaluation.features import FeatureExtractor, extract
from mlx_transfusion.evaluation.measures import Progress as Count
from mlx_transfusion.evaluation.measures import rate
from mlx_transfusion.evaluation.networks import load_extractor
from mlx_transfusion.evaluation.painters import Painter, load_painters
from mlx_transfusion.evaluation.report import (
    Progress,
    check_writable,
    model_record,
    run_record,
    write_json,
)
from mlx_transfusion.evaluation.retrieval import retrieve_pictures
from mlx_transfusion.model_io import Loaded

LEAST = 4
"""Fewest pictures of a set: their halves have two."""


@dataclass(frozen=True)
class Floor:
    """Real pictures in place of painted ones, as many where there are enough: how near is near."""

    what: str
    pictures: np.ndarray
    """Their features. float32 [F, D]"""
    references: np.ndarray
    """Features of other real pictures. float32 [R, D]"""


@dataclass(frozen=True)
class Split:
    """Captions to paint and what the pictures are compared with."""

    name: str
    chosen: np.ndarray
    """Rows that are painted. int [Q]"""
    pairs: Pairs
    all_pairs: Pairs
    """Among these a picture's own reference is looked for; `pairs` are there from the row `offset` on."""
    offset: int
    references: np.ndarray
    """Features of real pictures of the split. float32 [R, D]"""
    floor: Floor


def evaluate_distances(
    model_path: str | os.PathLike[str] | None,
    config_path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    quick: bool = False,
    *,
    compare: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    extractor: FeatureExtractor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Frechet and kernel distance between painted and real pictures, on training captions and on val.

    compare: a second model (before the config's `compare.model`), painted from the same captions and seeds
    with `compare.generation`; the report then has the ratios of the first model's distances to its. cache: a
    .npz file that keeps painted pictures and features from run to run. extractor: that of the
    config's `features` unless given. The other arguments are those of `report.evaluate`.

    Every caption is painted with the seed config.seed + its row, as for retrieval. Each figure has an interval
    (`distances.halves`; the same halves for both models), and a floor: the distance of as many other real
    pictures. Raises UserError for bad input, before anything is painted.
    """
    config = load_config(config_path, data, overrides)
    if quick:
        config = config.quick()
    if output is not None:
        check_writable(Path(output))
    kept = ArrayFile(None if cache is None else Path(cache))
    extractor = extractor or load_extractor(None if config.features is None else Path(config.features))
    painters = load_painters(model_path, compare or config.compare.model, config, quick)
    start = time.perf_counter()
    report = _head(config, quick, extractor, painters)
    for split in _splits(config, painters[0].loaded, extractor, kept, progress):
        report["distances"][split.name] = _measure(split, painters, config, extractor, kept, progress)
    report["seconds"] = {"total": round(time.perf_counter() - start, 2)}
    if output is not None:
        write_json(Path(output), report)
    return report


def _splits(
    config: EvaluationConfig, loaded: Loaded, extractor: FeatureExtractor, kept: ArrayFile, progress: Progress
) -> list[Split]:
    """Both splits, with the features of their real pictures."""
    size = loaded.trainable.picture_size
    pairs = {
        "train": read_pairs(config, config.train, *size),
        "val": read_pairs(config, config.val, *size),
    }
    chosen, real = {}, {}
    for name, p in pairs.items():
        if len(p) < LEAST:
            raise UserError(f"the {name} split has {len(p)} pictures: distances need {LEAST} or more")
        chosen[name] = choose(len(p), max(LEAST, config.counts.frechet), config.seed, "pictures")
        rows = choose(len(p), max(LEAST, config.counts.references), config.seed, "references")
        real[name] = _features(p.pixels[rows], extractor, kept, partial(progress, f"features, {name}"))
    train, val = pairs["train"], pairs["val"]
    order = shuffled(len(real["train"]), config.seed, "floor")
    part = order[: min(len(chosen["train"]), len(order) // 2)]
    rest, others = order[len(part) :], order[: len(chosen["val"])]
    return [
        Split("train", chosen["train"], train, train, 0, real["train"],
              Floor("other train pictures", real["train"][part], real["train"][rest])),
        Split("val", chosen["val"], val, train + val, len(train), real["val"],
              Floor("train pictures", real["train"][others], real["val"])),
    ]  # fmt: skip


def _measure(
    split: Split,
    painters: Sequence[Painter],
    config: EvaluationConfig,
    extractor: FeatureExtractor,
    kept: ArrayFile,
    progress: Progress,
) -> dict[str, Any]:
    sets = []
    out: dict[str, Any] = {}
    for painter in painters:
        label = f"{painter.loaded.name}, {split.name}"
        captions = [split.pairs.captions[i] for i in split.chosen]
        seeds = [config.seed + int(i) for i in split.chosen]
        pixels = painter.paint(captions, seeds, kept, partial(progress, f"pictures, {label}"))
        sets.append(_features(pixels, extractor, kept, partial(progress, f"features, {label}")))
        out[painter.role] = {"retrieval": _retrieval(split, pixels, config.seed)}
    count_up = partial(progress, f"distances, {split.name}")
    figures, ratio = compare_sets(sets, split.references, config.seed, count_up)
    for painter, values in zip(painters, figures, strict=True):
        out[painter.role] |= values
    floor = split.floor
    out["floor"] = {
        "what": floor.what,
        "count": len(floor.pictures),
        "references": len(floor.references),
        "frechet": frechet(floor.pictures, floor.references),
        "kernel": kernel_distance(floor.pictures, floor.references),
    }
    out |= {"count": len(split.chosen), "references": len(split.references)}
    return out | ({"ratio": ratio} if ratio is not None else {})


def _features(
    pixels: np.ndarray, extractor: FeatureExtractor, kept: ArrayFile, progress: Count
) -> np.ndarray:
    """Features of pictures [M, H, W, 3], computed or as they were kept: float32 [M, D]."""
    parts = []
    for rows in chunks(len(pixels)):
        name = array_name("features", {"extractor": extractor.fingerprint}, pixels[rows])
        count_up = partial(_shifted, progress, rows.start, len(pixels))
        parts.append(kept.get(name, partial(extract, extractor, pixels[rows], count_up)))
    return np.concatenate(parts)


def _shifted(progress: Count, start: int, total: int, done: int, _: int) -> None:
    progress(start + done, total)


def _retrieval(split: Split, pixels: np.ndarray, seed: int) -> dict[str, Any]:
    """How often a picture is nearest to its own reference, as in the other report, on these captions."""
    result = retrieve_pictures(
        pixels, split.chosen + split.offset, split.all_pairs.pixels, split.all_pairs.family
    )
    return {
        "references": len(split.all_pairs),
        "exact": rate(result.exact, result.exact_chance, seed),
        "variant": rate(result.variant, result.variant_chance, seed),
    }


def _head(
    config: EvaluationConfig, quick: bool, extractor: FeatureExtractor, painters: Sequence[Painter]
) -> dict[str, Any]:
    by_role = {painter.role: painter for painter in painters}
    other = by_role.get("compared")
    config = dataclasses.replace(
        config,
        generation=by_role["model"].settings,
        compare=dataclasses.replace(
            config.compare,
            model=None if other is None else other.loaded.name,
            generation=config.compare.generation if other is None else other.settings,
        ),
    )
    return {
        **run_record(config, quick, [config.train.rows, config.val.rows]),
        **{painter.role: model_record(painter.loaded) for painter in painters},
        "features": {"network": extractor.name, "fingerprint": extractor.fingerprint},
        "distances": {},
    }
