"""Peak memory of a conversion against that of its dry run: `python benchmarks/convert_memory.py --gigabytes 4`.

The checkpoint is synthetic (a hole in a file, read as zeros), so it takes no room; the converted folder does, and is
deleted. Each conversion runs in a process of its own, whose highest resident memory is what is told.
"""

from __future__ import annotations

import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.tokenizer import train_sentencepiece


def package() -> str:
    try:
        return import_module("mlx_transfusion.convert").__name__
    except ModuleNotFoundError:  # not installed: only the tree is on the path
        return "convert"


def make(folder: Path, gigabytes: float, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """Files of a model of ours of about that size: config.json, a small tokenizer, and zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    width, vocabulary = 2048, 32000
    if gigabytes < 1:
        width, vocabulary = 512, 4000
    layer = 12 * width**2  # feed-forward layers of 8/3 of the width
    layers = max(1, round((gigabytes * 1e9 / dtype.size - 2 * vocabulary * width) / layer))
    config = ModelConfig(vocabulary, width, layers, width // 64, 8 * width // 3 // 64 * 64)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    words = [f"{a}{b} heart star moon" for a in "abcdefgh" for b in "abcdefgh"]
    train_sentencepiece(words, folder / "tokenizer.model", 280)
    synthetic = import_module(f"{package()}.synthetic")
    synthetic.write_zeros(synthetic.plan_from_config(folder), dtype)
    return folder


def peak(source: Path, output: Path | None, quantize: str | None) -> dict[str, Any]:
    """Highest memory in bytes of a process that converts (or, without `output`, only accounts for) a checkpoint."""
    job = json.dumps([str(source), str(output) if output else None, quantize])
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def run_job(job: str) -> None:
    """The work of that process."""
    source, output, quantize = json.loads(job)
    run, sources = import_module(f"{package()}.run"), import_module(f"{package()}.sources")
    options = import_module(f"{package()}.quantize").Options(quantize)
    began = time.perf_counter()
    done = run.plan_of(sources.Source(Path(source)), options)
    if output:
        run.convert(done, Path(output))
    largest = max(job.info.nbytes for job in done.jobs)
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "seconds": time.perf_counter() - began,
        "checkpoint": sum(job.info.nbytes for job in done.jobs), "largest": largest, "written": done.nbytes,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments.job)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder) / "source", arguments.gigabytes)
        base = peak(source, None, None)
        print(f"checkpoint {base['checkpoint'] / 1e9:.2f} GB, largest tensor {base['largest'] / 1e6:.0f} MB")
        print(f"dry run: peak {base['peak'] / 1e6:.0f} MB, {base['seconds']:.1f} s")
        for quantize in (None, "4"):
            output = Path(folder) / f"out-{quantize}"
            done = peak(source, output, quantize)
            print(
                f"{quantize or 'whole'}: peak {done['peak'] / 1e6:.0f} MB "
                f"({(done['peak'] - base['peak']) / 1e6:.0f} MB over the dry run), "
                f"{done['written'] / 1e9:.2f} GB written, {done['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
