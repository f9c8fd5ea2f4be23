"""The bundled model that edits, on real edits that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mlx_transfusion.editing import Edit, edit_images
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import load
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.image_store import ImageTar
from mlx_transfusion.training.pixels import decode_image, fit

EXAMPLES = Path(__file__).parents[1] / "examples"
EDITS = 24


def pixels(name: str) -> np.ndarray:
    for split in ("train", "val"):
        store = ImageTar(EXAMPLES / f"emoji/data/emoji/{split}.tar")
        if name in store:
            return fit(decode_image(store.read(name), name), 32, 32)
    raise KeyError(name)


def test_most_edits_are_what_was_asked_for() -> None:
    """The nearest picture is the target, among the source and all that instructions make of it."""
    rows = [
        json.loads(line)
        for split in ("val", "train")
        for line in (EXAMPLES / f"edit_emoji/edits_{split}.jsonl").read_text("utf-8").splitlines()
    ]
    asked = rows[:EDITS]
    edits = [Edit(pixels(row["source"]), row["instruction"]) for row in asked]
    made = edit_images(load("emoji-edit"), edits, GenerationSettings(steps=4, batch_size=EDITS))
    hits = 0
    for row, image in zip(asked, made, strict=True):
        names = sorted({r["target"] for r in rows if r["source"] == row["source"]} | {row["source"]})
        errors = [np.square(image.pixels.astype(float) - pixels(name)).mean() for name in names]
        hits += names[int(np.argmin(errors))] == row["target"]
    assert hits >= 0.6 * EDITS  # 83% of all 120; copying the source hits none


def test_edit_without_a_model_is_the_bundled_ones(tmp_path: Path, cli: Callable[..., Any]) -> None:
    source, out = tmp_path / "hand.png", tmp_path / "out.png"
    PIL.Image.fromarray(pixels("1f44b.png")).save(source)
    assert cli("edit", source, "make it dark skin tone", "--steps", 2, "--output", out).code == 0
    assert read_record(out)["model"] == "emoji-edit"
