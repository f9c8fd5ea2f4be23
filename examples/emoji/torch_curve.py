"""The first steps of one run by MLX and by PyTorch, from the same first weights: metrics of both, and a drawing.

    python examples/emoji/torch_curve.py OUTPUT [--steps 200]

The model is a small one for the emoji (width 64, 4 layers). Rows, orders, noise and angles are the same on both
sides, so the losses can be compared step by step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SMALL = [
    "model.hidden_size=64", "model.num_hidden_layers=4", "model.intermediate_size=176", "optimizer.name=adamw",
    "optimizer.warmup=20", "batch_size=20", "log_every=1", "valid_every=0", "sample.every=0",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    train(given.output / "start", "mlx_transfusion", [*SMALL, "steps=1", "optimizer.learning_rate=0.0"])
    start = next((given.output / "start/checkpoints").iterdir())
    shared = [*SMALL, f"steps={given.steps}", f"save_every={given.steps}", f"init={start.resolve()}"]
    curves = {}
    for side, module in (("mlx", "mlx_transfusion"), ("torch", "mlx_transfusion.torch.train")):
        train(given.output / side, module, shared)
        lines = (given.output / side / "metrics.jsonl").read_text().splitlines()
        curves[side] = [json.loads(line) for line in lines]
    worst = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(*curves.values(), strict=True))
        for name in ("text_loss", "image_loss", "loss")
    }
    draw(given.output / "curves.png", {k: [x["loss"] for x in v] for k, v in curves.items()})
    (given.output / "difference.json").write_text(
        json.dumps({"steps": given.steps, **worst}, indent=2) + "\n"
    )
    print(json.dumps(worst))


def train(output: Path, module: str, changes: list[str]) -> None:
    command = [sys.executable, "-m", module]
    command += [str(HERE / "train.toml")] if module.endswith("train") else ["train", str(HERE / "train.toml")]
    for change in [f"output={output}", *changes]:
        command += ["--set", change]
    subprocess.run(command, check=True)


def draw(file: Path, curves: dict[str, list[float]], width: int = 640, height: int = 320) -> None:
    """Both curves in one picture, the second as dots over the first."""
    low = min(min(c) for c in curves.values())
    high = max(max(c) for c in curves.values())
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for (name, curve), colour in zip(curves.items(), ("#999999", "#d02020"), strict=True):
        points = [
            (20 + i * (width - 40) / max(1, len(curve) - 1), 20 + (high - y) / (high - low) * (height - 40))
            for i, y in enumerate(curve)
        ]
        if name == "mlx":
            pen.line(points, fill=colour, width=3)
        else:
            for x, y in points[:: max(1, len(points) // 100)]:
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        pen.text((width - 120, 20 + 14 * list(curves).index(name)), f"{name}: loss", fill=colour)
    image.save(file)


if __name__ == "__main__":
    main()
