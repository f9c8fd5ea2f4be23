"""Fine-tuning in two processes under `mlx.launch`: an adapter of our own family, and one of a converted model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from family_tools import album, model_folder
from tiny_training import assert_close, launch, losses_of, metrics, state

from mlx_transfusion.finetune.config import FinetuneConfig
from mlx_transfusion.finetune.run import finetune, make_plan
from mlx_transfusion.training import checkpoint as ckpt

CLOSE = 1e-3
"""Of the norm of an array: 2e-4 was found, in one layer whose gradients begin near zero, which Adam divides by."""

RUN = """
import dataclasses, json, sys
from mlx_transfusion.finetune.config import FinetuneConfig
from mlx_transfusion.finetune.run import finetune, make_plan
for settings in json.loads(sys.argv[1]):
    config = FinetuneConfig(**settings)
    plan = make_plan(config)
    finetune(config, dataclasses.replace(plan, config=dataclasses.replace(plan.config, log_every=1)))
"""


def alone(settings: dict[str, Any]) -> Path:
    """The run of RUN in this process; its last checkpoint."""
    config = FinetuneConfig(**settings)
    plan = make_plan(config)
    finetune(config, dataclasses.replace(plan, config=dataclasses.replace(plan.config, log_every=1)))
    return last_of(config.output)


def last_of(output: str | Path) -> Path:
    return ckpt.checkpoints(Path(output) / "checkpoints")[-1]


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_each_other(tmp_path: Path, tiny_model_dir: Path) -> None:
    pictures = album(tmp_path / "album")
    folders = {"own": tiny_model_dir, "converted": model_folder("janusflow", tmp_path / "model")}
    common: dict[str, Any] = {
        "data": str(pictures), "iters": 4, "save_every": 2, "batch_size": 5, "rank": 2, "caption_first": 1.0
    }  # fmt: skip
    one = {n: common | {"model": str(m), "output": str(tmp_path / f"{n}-1")} for n, m in folders.items()}
    one["converted"]["low_ram"] = True
    wanted = {name: alone(settings) for name, settings in one.items()}
    two = {name: settings | {"output": str(tmp_path / f"{name}-2")} for name, settings in one.items()}
    # a run of one process that was stopped after step 2, for two to go on with
    handed = one["own"] | {"output": str(tmp_path / "handed")}
    shutil.copytree(one["own"]["output"], handed["output"])
    shutil.rmtree(last_of(handed["output"]))

    (tmp_path / "run.py").write_text(RUN)
    printed = launch(tmp_path / "run.py", json.dumps([*two.values(), handed]))

    for name, settings in two.items():
        output = Path(settings["output"])
        assert (output / "adapters.safetensors").is_file(), printed
        assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4]  # only one of them wrote
        for a, b in zip(losses_of(Path(one[name]["output"])), losses_of(output), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert_close(state(wanted[name]), state(last_of(output)), CLOSE)
    assert_close(state(wanted["own"]), state(last_of(handed["output"])), CLOSE)
    # and the other way: one process goes on where two were stopped
    shutil.rmtree(last_of(two["own"]["output"]))
    assert_close(state(wanted["own"]), state(alone(two["own"])), CLOSE)
