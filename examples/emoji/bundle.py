"""Put a trained model into the package: python examples/emoji/bundle.py MODEL [--bits 8]

Takes a checkpoint (its EMA weights), a model folder or an adapter, with its config, objective and tokenizer, and
stores the weights in half precision, or with --bits the decoder's matrices, embedding and head in fewer bits. A
consistency model becomes the bundled student, any other the bundled teacher; --output stores it elsewhere.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.objective import read_objective
from mlx_transfusion.quantization import dequantize, quantize

BUNDLED = Path(__file__).parents[2] / "mlx_transfusion" / "bundled"
TEACHER, STUDENT = "emoji", "emoji-2step"


def main(arguments: Sequence[str] | None = None) -> int:
    """Load strictly, save, print what it takes; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--bits", type=int, help="of the stored matrices: 2, 3, 4, 5, 6 or 8; default 16")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"default: {TEACHER} or {STUDENT}, bundled"
    )
    options = parser.parse_args(arguments)
    try:
        folder = bundle(options.model, options.bits, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {size(folder) / 1e6:.2f} MB")
    print(f"all bundled models: {sum(size(f) for f in BUNDLED.iterdir()) / 1e6:.2f} MB")
    return 0


def bundle(model: str, bits: int | None = None, output: Path | None = None) -> Path:
    """Store `model` (anything that `load` takes) small; returns the folder, `output` or the bundled one.

    Raises UserError as `load`, `quantize` and `save_model` do.
    """
    loaded = load(model)
    dequantize(loaded.model)
    extra = {key: table for key, table in loaded.extra.items() if not key.startswith("quantization")}
    if output is None:
        output = BUNDLED / (STUDENT if read_objective(extra, loaded.name).consistency else TEACHER)
    if bits is not None:
        quantize(loaded.model, bits)
    return save_model(output, loaded.model, loaded.tokenizer, extra, dtype=mx.float16)


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
