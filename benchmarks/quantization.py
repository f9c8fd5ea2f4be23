"""What bits cost: size, perplexity and velocity error of one model, stored in several ways by `convert --quantize`.

    python benchmarks/quantization.py --texts glosses/val.jsonl --pictures docs/quantized.png

The reference is the model's own weights at full width (the bundled ones are stored at 8 bits). Velocity error is
mean((v - v_ref)^2) / mean(v_ref^2) over captions and angles, on the same noise; pictures use the same seeds.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from convert_memory import package
from PIL import Image

from mlx_transfusion import noise
from mlx_transfusion.evaluation.perplexity import score_documents, text_document
from mlx_transfusion.generation import generate_images
from mlx_transfusion.images import grid
from mlx_transfusion.model_io import Loaded, load, save_model
from mlx_transfusion.painting import prefill

WAYS = ("whole", "8", "6", "5", "4", "3", "mxfp4")
ANGLES = (0.3, 0.8, 1.2, 1.5)
"""Radians: little to much noise."""
PICTURES = 10
CAPTIONS = (
    "red heart", "grinning face", "crescent moon", "green apple", "cat face", "blue circle", "fire", "snowman",
    "red car", "sunflower",
)  # fmt: skip
ENLARGE = 3


def stored(model: Loaded, folder: Path, way: str) -> Path:
    """The model in a new folder, converted from its whole weights."""
    whole = folder / "whole"
    if not whole.exists():
        extra = {key: table for key, table in model.extra.items() if not key.startswith("quantization")}
        save_model(whole, model.transfusion, model.tokenizer, extra, dtype=mx.float16)
    if way == "whole":
        return whole
    run, sources = (import_module(f"{package()}.{name}") for name in ("run", "sources"))
    options = import_module(f"{package()}.quantize").Options(way)
    return run.convert(run.plan_of(sources.Source(whole, "whole"), options), folder / way)


def measured(
    loaded: Loaded, texts: list[str], reference: np.ndarray | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Perplexity of texts, and the velocities [angles, captions, N, P] with their error against the reference's."""
    model, config = loaded.transfusion, loaded.transfusion.config
    documents = [text_document(loaded.tokenizer.encode(text), config) for text in texts]
    seen = velocities(loaded)
    out = {"perplexity": score_documents(model, documents).summary()["perplexity"]}
    if reference is not None:
        out["velocity error"] = float(((seen - reference) ** 2).mean() / (reference**2).mean())
    return out, seen


def velocities(loaded: Loaded) -> np.ndarray:
    """Of noise behind CAPTIONS, at ANGLES."""
    model = loaded.pictures
    cache = prefill(model, [model.image_prefix(loaded.tokenizer.encode(text)) for text in CAPTIONS])
    x = mx.array(
        np.stack(
            [noise.normal(0, i, model.latent_shape, "benchmark/quantization") for i in range(len(CAPTIONS))]
        )
    )
    return np.stack([np.array(model.velocity(x, mx.full(len(CAPTIONS), a), cache)) for a in ANGLES])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with a key `text`")
    parser.add_argument("--count", type=int, default=500, help="texts that are read")
    parser.add_argument("--pictures", type=Path, help="PNG with the same pictures at whole, 8 and 4 bits")
    arguments = parser.parse_args()
    lines = arguments.texts.read_text(encoding="utf-8").splitlines()[: arguments.count]
    texts = [json.loads(line)["text"] for line in lines]
    rows: list[np.ndarray] = []
    reference: np.ndarray | None = None
    print("| stored as | MB | bits a weight | perplexity | velocity error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        original = load(arguments.model, dtype=mx.float32)
        for way in WAYS:
            path = stored(original, Path(folder), way)
            meta = json.loads((path / "model.safetensors.index.json").read_text())["metadata"]
            loaded = load(path)
            facts, seen = measured(loaded, texts, reference)
            reference = seen if reference is None else reference
            print(
                f"| {'16 bits' if way == 'whole' else way} | {meta['total_size'] / 1e6:.2f} | "
                f"{8 * meta['total_size'] / meta['total_parameters']:.2f} | {facts['perplexity']:.2f} | "
                f"{facts.get('velocity error', 0.0):.2e} |",
                flush=True,
            )
            if arguments.pictures and way in ("whole", "8", "4", "mxfp4"):
                rows += [picture.pixels for picture in generate_images(loaded, CAPTIONS, range(PICTURES))]
    if arguments.pictures:
        sheet = Image.fromarray(grid(rows, columns=PICTURES))
        sheet.resize((sheet.width * ENLARGE, sheet.height * ENLARGE), Image.Resampling.NEAREST).save(
            arguments.pictures
        )


if __name__ == "__main__":
    main()
