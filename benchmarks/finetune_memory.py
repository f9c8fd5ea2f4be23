"""The memory estimate of `finetune` beside MLX's measured peak, each setting in a process of its own.

    python benchmarks/finetune_memory.py [--json FILE]

A model of the bundled one's size with random weights, forty random pictures, three steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

CAPTION = "a red heart with a smiling face"
ADAPTER = {"rank": 8}
SMALL_PATCHES = {"patch_size": 4}
WIDE = {"patch_size": 4, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024}
CASES: dict[str, dict[str, Any]] = {
    "full, batch 8": {"batch_size": 8},
    "full, batch 32": {"batch_size": 32},
    "full, batch 16, checkpointed": {"batch_size": 16, "gradient_checkpointing": True},
    "LoRA, batch 8": {"batch_size": 8, "adapter": ADAPTER},
    "LoRA, batch 32": {"batch_size": 32, "adapter": ADAPTER},
    "LoRA, batch 32 in 4 parts": {"batch_size": 32, "accumulate": 4, "adapter": ADAPTER},
    "LoRA, batch 32, checkpointed": {"batch_size": 32, "gradient_checkpointing": True, "adapter": ADAPTER},
    "DoRA, batch 16": {"batch_size": 16, "adapter": ADAPTER | {"type": "dora"}},
    "QLoRA 8 bits, batch 16": {"batch_size": 16, "adapter": ADAPTER | {"quantize": 8}},
    "LoRA, 64 patches": {
        "batch_size": 16, "sequence_length": 96, "model": SMALL_PATCHES, "adapter": ADAPTER,
    },
    "LoRA, 256 patches": {
        "batch_size": 4, "sequence_length": 288, "model": {"patch_size": 2}, "adapter": {"rank": 4},
    },
    "LoRA, width 384": {"batch_size": 8, "sequence_length": 96, "model": WIDE, "adapter": {"rank": 16}},
}  # fmt: skip


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Estimate and measured peak of one setting, bytes."""
    import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)
    import mlx.core as mx
    import numpy as np
    from PIL import Image

    from mlx_transfusion.config import ModelConfig
    from mlx_transfusion.finetune.memory import estimate
    from mlx_transfusion.model_io import load, save_model
    from mlx_transfusion.models.transfusion import Transfusion
    from mlx_transfusion.training.config import (
        AdapterTraining,
        DataConfig,
        OptimizerConfig,
        SourceConfig,
        TrainConfig,
    )
    from mlx_transfusion.training.trainer import Trainer

    bundled = load("emoji")
    fields = bundled.config.to_dict() | case.get("model", {})
    config = ModelConfig.from_dict(fields)
    settings = {key: value for key, value in case.items() if key not in ("model", "adapter")}
    adapter = AdapterTraining(**case["adapter"]) if "adapter" in case else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", Transfusion(config), bundled.tokenizer)
        rng = np.random.default_rng(0)
        lines = []
        for i in range(40):
            pixels = rng.integers(0, 256, (config.image_height, config.image_width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            lines.append(json.dumps({"image": f"{i}.png", "text": CAPTION}) + "\n")
        (folder / "rows.jsonl").write_text("".join(lines))
        run = TrainConfig(
            output=str(folder / "out"), tokenizer=str(folder / "model"), init=str(folder / "model"), steps=3,
            data=DataConfig((SourceConfig(str(folder / "rows.jsonl")),)), adapter=adapter,
            optimizer=OptimizerConfig(warmup=1), **({"sequence_length": 48} | settings),
        )  # fmt: skip
        length = config.patches_per_image + 4 + len(bundled.tokenizer.encode(CAPTION))
        del bundled
        before = mx.get_active_memory()
        trainer = Trainer(run)
        mx.reset_peak_memory()
        trainer.run()
        found = estimate(run, config, Counter([length]))
        return {"estimate": found.total, "peak": mx.get_peak_memory() - before}


def main() -> None:
    """Print a table of all settings; with --json also write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case])))
        return
    results = {}
    print("| setting | estimate MB | measured MB | ratio |\n|---|---|---|---|")
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        r = results[name] = json.loads(done.stdout.splitlines()[-1])
        ratio = r["estimate"] / r["peak"]
        print(f"| {name} | {r['estimate'] / 1e6:.0f} | {r['peak'] / 1e6:.0f} | {ratio:.2f} |", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
