"""Tensor parallelism over gloo, also two by two with FSDP2, and hybrid sharding train what one process trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402
from torch_tools import finish, job, start  # noqa: E402

from mlx_transfusion.errors import UserError  # noqa: E402
from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402
from mlx_transfusion.torch.checkpoint import read_record  # noqa: E402
from mlx_transfusion.torch.export import export  # noqa: E402
from mlx_transfusion.torch.folder import read_weights  # noqa: E402
from mlx_transfusion.torch.machines import Machines  # noqa: E402
from mlx_transfusion.torch.parallel import processes  # noqa: E402
from mlx_transfusion.torch.trainer import Trainer, train  # noqa: E402
from mlx_transfusion.training.config import load_train_config  # noqa: E402

POISON = """
import os, mlx_transfusion.torch.step as step
backward = step.Step.backward
def poisoned(self, batch, text_total, image_total, n):
    sums = backward(self, batch, text_total, image_total, n)
    return sums * float("nan") if n in (1, 2) and os.environ["RANK"] == "1" else sums
step.Step.backward = poisoned
"""
# Fewer keys than queries, and gains that all heads share: what is easy to get wrong.
CHANGES = [
    "model.num_key_value_heads=2",
    "model.qk_norm=true",
    "save_every=3",
    "accumulate=2",
    "batch_size=8",
]


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("tensor"), tiny_tokenizer)


def on_one(toml: Path, output: Path) -> Path:
    with processes() as world:
        return train(load_train_config(toml, [f"output={output}", *CHANGES]), Machines(peak_flops=1e9), world)


def as_if_killed(run: Path, output: Path) -> Path:
    """A copy of a run that stands at step 3 of 6."""
    shutil.copytree(run, output)
    shutil.rmtree(output / "torch/step-00000006")
    return output


@pytest.fixture(scope="module")
def runs(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process; two that share every block; two pairs from the first one's checkpoint; one from the pair's.

    "copies" are two that share nothing (hybrid sharding); of the "poisoned" one finds two losses that are not finite.
    """
    folder = tmp_path_factory.mktemp("runs")
    last = {"one": on_one(toml, folder / "one")}
    as_if_killed(folder / "one", folder / "four")
    jobs = []
    for name, count, flags, before in (
        ("two", 2, ["--tensor", "2"], ""),
        ("four", 4, ["--tensor", "2"], ""),
        ("copies", 2, ["--replicas", "2"], ""),
        ("poisoned", 2, [], POISON),
    ):
        flags += ["--peak-flops", "1e9"]
        jobs.append(job(toml, folder / name, count, *CHANGES, flags=flags, before=before))
        last[name] = folder / name / "torch/step-00000006"
    finish(start(*jobs))
    last["back"] = on_one(toml, as_if_killed(folder / "two", folder / "back"))
    return last


def lines(checkpoint: Path) -> list[dict[str, Any]]:
    return [json.loads(s) for s in (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "before", "after"), [("two", 2, 2), ("four", 1, 4), ("back", 2, 1), ("copies", 2, 2)]
)
def test_as_one_process(name: str, before: int, after: int, runs: dict[str, Path], tmp_path: Path) -> None:
    """before, after: processes of steps 1 to 3, and of 4 to 6."""
    for a, b in zip(lines(runs["one"]), lines(runs[name]), strict=True):
        for key in ("text_loss", "image_loss", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
        # Operations a token: documents are counted once, shared or not.
        a_token, wanted = (x["mfu"] / x["tokens_per_second"] for x in (b, a))
        assert a_token * (before if a["step"] <= 3 else after) == pytest.approx(wanted, rel=1e-9)
    for which in ("average", "weights"):
        wanted, found = (
            dict(read_weights(export(runs[n], tmp_path / which / n, which))) for n in ("one", name)
        )
        for key, value in wanted.items():
            assert found[key].shape == value.shape
            assert (found[key] - value).norm() <= 1e-4 * value.norm() + 1e-9, key


def test_what_one_process_finds_bad_all_leave_out(runs: dict[str, Path]) -> None:
    record = read_record(runs["poisoned"])
    assert (record["step"], record["updates"], record["skipped"]) == (6, 4, 2)


def test_what_cannot_be_dealt_out(toml: Path, tmp_path: Path) -> None:
    config = load_train_config(toml, [f"output={tmp_path}"])
    with processes() as world:
        for count in (0, 2):
            with pytest.raises(UserError, match=f"--tensor {count}: 1 processes cannot be dealt"):
                Trainer(config, Machines(tensor=count), world)
