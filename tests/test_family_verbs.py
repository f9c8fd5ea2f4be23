"""Converted models on the command line, and adapters of every kind of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_tools import FAMILIES, album, model_folder, run_config

from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import flat_parameters, load
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.training.config import AdapterTraining
from mlx_transfusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("verbs")
    return {kind: model_folder(kind, top / kind) for kind in FAMILIES} | {"album": album(top / "album")}


def painted(model: Any) -> mx.array:
    """Latents of one picture."""
    return paint(model, [model.image_prefix([3, 4])], [1], GenerationSettings(steps=2))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_dora_paints_as_the_model_it_was_trained_in(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = AdapterTraining("dora", rank=2)
    trainer = Trainer(run_config(folders[kind], folders["album"], tmp_path / "out", adapter=spec, steps=3))
    last = trainer.run()
    saved: dict[str, mx.array] = mx.load(str(last / "adapters.safetensors"))  # type: ignore[assignment]
    assert any(name.endswith(".m") for name in saved)
    with trainer._averaged():
        wanted = painted(trainer.model)
    np.testing.assert_allclose(painted(load(last).model), wanted, atol=2e-4)
    assert mx.abs(wanted - painted(load(folders[kind]).model)).max() > 1e-3


def test_a_full_fine_tune(folders: dict[str, Path], tmp_path: Path, cli: Any) -> None:
    """All weights but the autoencoder's and the picture reader's; the result paints and is fine-tuned in turn."""
    model, out = folders["janusflow"], tmp_path / "full"
    flags = ["--data", folders["album"], "--iters", 2, "--save-every", 1]
    tuned = cli("finetune", "--model", model, *flags, "--output", out, "--type", "full")
    assert tuned.code == 0, tuned.err
    folder = Path(tuned.out.strip())
    before, after = (flat_parameters(load(path).model) for path in (model, folder))
    same = {name.split(".")[0] for name in before if mx.array_equal(before[name], after[name])}
    changed = {name.split(".")[0] for name in before if not mx.array_equal(before[name], after[name])}
    assert {"autoencoder", "vision_und_enc_model"} <= same - changed
    assert {"language_model", "vision_gen_dec_model"} <= changed
    picture = tmp_path / "p.png"
    made = cli("generate", "a red square", "--model", folder, "--steps", 2, "--seed", 1, "-o", picture)
    assert made.code == 0, made.err
    again = cli("finetune", "--model", folder, *flags, "--output", tmp_path / "again", "--rank", 2)
    assert again.code == 0, again.err


@pytest.mark.parametrize("student", ["adapter", "whole"])
def test_distil_from_a_toml(student: str, folders: dict[str, Path], tmp_path: Path, cli: Any) -> None:
    toml, out = tmp_path / "distill.toml", tmp_path / "out"
    toml.write_text(
        f"""
output = {json.dumps(str(out))}
tokenizer = {json.dumps(str(folders["bagel"]))}
steps = 3
batch_size = 2
save_every = 2
valid_every = 2
[data]
caption_first = 1.0
[[data.train]]
rows = {json.dumps(str(folders["album"] / "train.jsonl"))}
[[data.valid]]
rows = {json.dumps(str(folders["album"] / "train.jsonl"))}
[optimizer]
warmup = 1
[sample]
prompts = ["red square"]
every = 3
[consistency]
teacher = {json.dumps(str(folders["bagel"]))}
guidance = 2.0
valid_pictures = 2
"""
        + ("[adapter]\nrank = 2\n" if student == "adapter" else "")
    )
    refused = cli("train", toml)
    assert refused.code == 2
    assert "use the verb distill" in refused.err
    distilled = cli("distill", toml, "--set", "low_ram=true")
    assert distilled.code == 0, distilled.err
    folder = Path(distilled.out.strip())
    assert folder.name == "step-00000003"
    assert (out / "samples" / "step-00000003.png").is_file()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("valid_teacher_gap_2" in row for row in metrics)
    assert cli("distill", toml).code == 0  # finished: nothing is done again
    picture = tmp_path / "p.png"
    made = cli("generate", "a red square", "--model", folder, "--seed", 1, "-o", picture)
    assert made.code == 0, made.err
    record = read_record(picture)
    assert (record["sampler"], record["guidance"]) == ("consistency", 1.0)
