"""How far students are from the ends of their teacher's trajectories, angle by angle, as a Markdown table.

    python examples/emoji/flow_map.py emoji emoji-2step OTHER_STUDENT ...

The first model is the teacher; its own weights in a student's place are the first row. The captions and pictures are
the first of the training set's shuffle. What is measured: mlx_transfusion/evaluation/flow_map.py.
"""

import argparse
import sys
from pathlib import Path

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.evaluation.data import load_pairs, shuffled
from mlx_transfusion.evaluation.flow_map import ANGLES, flow_map_errors
from mlx_transfusion.model_io import load
from mlx_transfusion.text_to_image import image_prefix

STREAM = "flow map"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="a diffusion model")
    parser.add_argument("students", nargs="*", help="consistency models")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("evaluate.toml"))
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}: use at least 1")
    config = load_config(arguments.config)
    teacher = load(arguments.teacher)
    students = [teacher, *map(load, arguments.students)]
    pairs = load_pairs(config, config.train, teacher.transfusion.config)
    chosen = shuffled(len(pairs), config.seed, STREAM)[: arguments.count]
    prefixes = [image_prefix(teacher, pairs.captions[i]) for i in chosen]
    x0 = teacher.pictures.encode(mx.array(pairs.pixels[chosen]).astype(mx.float32) / 255)
    z = [noise.normal(config.seed, int(i), teacher.pictures.latent_shape, STREAM) for i in chosen]
    errors = flow_map_errors(
        [s.pictures for s in students],
        teacher.pictures,
        prefixes,
        x0,
        mx.array(np.stack(z)),
        arguments.guidance,
    )
    print("| angle | " + " | ".join(f"{a:.2f}" for a in ANGLES) + " |")
    print("|---" * (1 + len(ANGLES)) + "|")
    for student, row in zip(students, errors, strict=True):
        print(f"| {student.name} | " + " | ".join(f"{e:.4f}" for e in row) + " |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
