"""`evaluate`: measure a model by a config and write the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import EvaluationConfig, load_config
from mlx_transfusion.evaluation.data import load_texts, read_pairs
from mlx_transfusion.evaluation.measures import (
    Split,
    measure_descriptions,
    measure_losses,
    measure_pictures,
    measure_text,
)
from mlx_transfusion.evaluation.networks import ClipFeatures
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.objective import TOKENS
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.settings import GenerationSettings, ResolvedSettings
from mlx_transfusion.text_to_image import check_pictures

QUICK_STEPS = 8
"""At most this many steps of a diffusion sampler with `quick`."""

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


def evaluate(
    model_path: str | os.PathLike[str] | None,
    config_path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    quick: bool = False,
    *,
    data: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model: retrieval of pictures and of descriptions, perplexity, and losses by modality.

    model_path: as `model_io.load` takes it. config_path: a TOML of `EvaluationConfig`. output: file for the
    report as JSON, replaced when it exists; None writes none. quick: small counts, to see that all runs.
    data: the data folder, before MLX_TRANSFUSION_DATA and the TOML. overrides: "key.path=value" for keys of
    the TOML. progress(what, done, total) is called often.

    Returns the report; `table.table` shows it. Figures repeat with the same model, config and machine. Raises
    UserError for bad input, before anything is measured.
    """
    config = load_config(config_path, data, overrides)
    if quick:
        config = config.quick()
    if output is not None:
        check_writable(Path(output))
    loaded = load(model_path)
    config = dataclasses.replace(config, generation=settings_for(loaded, config.generation, quick))
    report = measure(loaded, config, quick, progress or (lambda what, done, total: None))
    if output is not None:
        write_json(Path(output), report)
    return report


def measure(loaded: Loaded, config: EvaluationConfig, quick: bool, progress: Progress) -> dict[str, Any]:
    """The report of a loaded model."""
    size = loaded.trainable.picture_size
    check_pictures(loaded)
    train = read_pairs(config, config.train, *size)
    val = read_pairs(config, config.val, *size)
    train_texts = load_texts(config, config.train_texts, config.counts.baseline_texts)
    val_texts = load_texts(config, config.val_texts, config.counts.texts)
    clip = None if config.clip is None else ClipFeatures(Path(config.clip))
    # Unseen pictures are looked for among all there are.
    splits = (Split("train", train, train, 0), Split("val", val, train + val, len(train)))
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        start = time.perf_counter()
        progress(name, 0, 1)
        out = work(*arguments)
        progress(name, 1, 1)
        seconds[name] = round(time.perf_counter() - start, 2)
        return out

    report = _head(loaded, config, quick)
    for split in splits:
        name = split.name
        report["losses"][name] = timed(f"losses, {name}", measure_losses, loaded, config, split)
        painting = partial(measure_pictures, clip=clip)
        for kind, work in (("descriptions", measure_descriptions), ("pictures", painting)):
            label = f"{kind}, {name}"
            report[kind][name] = timed(label, work, loaded, config, split, partial(progress, label))
    report["text"] = timed("text", measure_text, loaded, config, train_texts, val_texts)
    report["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    return report


def settings_for(loaded: Loaded, generation: GenerationSettings, quick: bool) -> ResolvedSettings:
    """What the model is painted with; fewer steps when `quick`. Raises UserError where it cannot."""
    settings = generation.for_model(loaded.extra, loaded.name)
    if quick and settings.angles is None and settings.sampler != TOKENS:
        settings = dataclasses.replace(settings, steps=min(settings.steps, QUICK_STEPS))
    return settings


def _head(loaded: Loaded, config: EvaluationConfig, quick: bool) -> dict[str, Any]:
    """What was measured, on what, and how: enough to measure it again."""
    files = [config.train.rows, config.val.rows, config.train_texts, config.val_texts]
    head = run_record(config, quick, files)
    return head | {"model": model_record(loaded), "losses": {}, "descriptions": {}, "pictures": {}}


def model_record(loaded: Loaded) -> dict[str, Any]:
    """Which model was measured."""
    return {
        "name": loaded.name,
        "fingerprint": loaded.fingerprint,
        "parameters": parameter_count(loaded.model),
    }


def run_record(config: EvaluationConfig, quick: bool, files: Sequence[str]) -> dict[str, Any]:
    """Version, settings, and the hashes of the data files and of the pictures that are files."""
    from mlx_transfusion import __version__

    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # lists for tuples: as it is read back
    del settings["data"]  # where the data lay is no setting; its contents are told by their hashes
    images = [pairs.images for pairs in (config.train, config.val) if pairs.images is not None]
    paths = {name: config.path(name) for name in (*files, *images)}
    return {
        "version": __version__,
        "quick": quick,
        "settings": settings,
        "data_sha256": {name: _sha256(path) for name, path in paths.items() if path.is_file()},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """Raises UserError when the report could not be written: an hour of measuring should not end so."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give a file name for the report")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot write the report: {path.parent} is no folder that can be written")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report whole or not at all. Raises UserError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the report: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
