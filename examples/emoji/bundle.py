"""Put a trained checkpoint into the package: python examples/emoji/bundle.py CHECKPOINT

Takes the EMA weights of the checkpoint, stored in half precision, with their config and tokenizer.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_transfusion.model_io import load, save_model

TARGET = Path(__file__).parents[2] / "mlx_transfusion" / "bundled" / "emoji"


def main() -> None:
    """Load strictly, save as float16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    loaded = load(arguments.checkpoint)
    save_model(arguments.output, loaded.model, loaded.tokenizer, dtype=mx.float16)
    size = sum(f.stat().st_size for f in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
