"""Dry runs over checkpoints of real names, shapes and sizes, whose numbers are holes in files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import janusflow_tools
import mlx.core as mx
import pytest
from convert_package import module

from mlx_transfusion.cli import main

synthetic = module("synthetic")
CONFIGS = Path(__file__).parent / "fixtures" / "real_sizes"
DOCUMENT = Path(__file__).parents[1] / "docs" / "converters.md"
INSIDE = {"BAGEL-7B-MoT": "ae.safetensors", "show-o2-1.5B": "vae.safetensors"}
"""Autoencoders that lie in the same folder."""
AUTOENCODERS = {"JanusFlow-1.3B": "sdxl-vae", "MonoFormer_ImageNet_256": "sd-vae-ft-mse"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all configs; tests do not write into it."""
    top = tmp_path_factory.mktemp("real") / "sizes"
    shutil.copytree(CONFIGS, top)
    janusflow_tools.tokenizer().save(str(top / "JanusFlow-1.3B" / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (top / "JanusFlow-1.3B" / "tokenizer_config.json").write_text(json.dumps(tokens))
    for name, file in INSIDE.items():
        (top / name / file).touch()
    for name in sorted(p.name for p in top.iterdir() if p.name not in AUTOENCODERS):
        synthetic.write_zeros(synthetic.plan_from_config(top / name), mx.bfloat16)
    for name, coder in AUTOENCODERS.items():
        plan = synthetic.plan_from_config(top / name, autoencoder=top / coder)
        synthetic.write_zeros(plan, mx.float32 if "Mono" in name else mx.bfloat16)
    return top


def dry_run(folder: Path, name: str, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    coder = ["--autoencoder", str(folder / AUTOENCODERS[name])] if name in AUTOENCODERS else []
    with pytest.raises(SystemExit) as done:
        main(["convert", str(folder / name), *coder, "--dry-run", "--json", *flags])
    said = capsys.readouterr()
    assert (done.value.code, said.err) == (0, "")
    return json.loads(said.out)


@pytest.mark.parametrize(
    ("name", "tensors", "gigabytes", "millions"),
    [  # sizes of the published files; parameters without those that the model does not use
        ("JanusFlow-1.3B", 587, 4.09, 2117),
        ("MonoFormer_ImageNet_256", 215, 4.49, 1205),
        ("SmolLM2-135M-Instruct", 272, 0.269, 134.5),
        ("Llama-3.2-1B", 146, 2.47, 1235.8),
        ("sdxl-vae", 248, 0.167, 83.65),
        ("BAGEL-7B-MoT", 1223, 29.21, 14691),
        ("show-o2-1.5B", 909, 5.66, 2955),
    ],
)
def test_every_tensor_has_its_place(folder: Path, capsys: pytest.CaptureFixture[str], name: str, tensors: int,
                                    gigabytes: float, millions: float) -> None:  # fmt: skip
    file = folder / name / "model.safetensors"
    assert file.stat().st_size == pytest.approx(gigabytes * 1e9, rel=3e-3)
    assert file.stat().st_blocks * 512 < 1e6  # it takes no room
    facts = dry_run(folder, name, capsys)
    coder = {"BAGEL-7B-MoT": 244, "show-o2-1.5B": 194}.get(name, 248 if name in AUTOENCODERS else 0)
    counts = facts["tensors"]
    assert counts["in the checkpoint"] == tensors + coder
    assert counts["used"] + sum(counts["unused"].values()) == counts["in the checkpoint"]
    left_out = {"JanusFlow-1.3B": 13, "show-o2-1.5B": 8}.get(name, 0)
    assert sum(counts["unused"].values()) == left_out
    assert facts["parameters"] == pytest.approx(millions * 1e6, rel=1e-3)


ROW = re.compile(
    r"\| ([\w.-]+)[^|]* \| ([\d.]+) billion \| ([\d.]+ [GM]B) \| ([\d.]+ [GM]B) \| ([\d.]+ [GM]B) \|"
)
PREDICTED = [match.groups() for match in ROW.finditer(DOCUMENT.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("row", PREDICTED, ids=[row[0] for row in PREDICTED])
def test_the_documentation_tells_what_is_predicted(
    folder: Path, capsys: pytest.CaptureFixture[str], row: tuple[str, ...]
) -> None:
    name = next(p.name for p in folder.iterdir() if p.name.lower().startswith(row[0].lower()))
    facts = [dry_run(folder, name, capsys, *flags) for flags in ((), ("-q", "8"), ("-q", "4"))]
    assert f"{facts[0]['parameters'] / 1e9:.{len(row[1].split('.')[1])}f}" == row[1]
    for fact, told in zip(facts, row[2:], strict=True):
        number, unit = told.split()
        digits = len(number.partition(".")[2])
        assert f"{fact['weights'] / {'GB': 1e9, 'MB': 1e6}[unit]:.{digits}f}" == number


def test_the_document_has_all_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coders = {*AUTOENCODERS.values()}
    assert len(PREDICTED) == len([p for p in folder.iterdir() if p.name not in coders])
    assert dry_run(folder, "JanusFlow-1.3B", capsys, "-q", "4")["weights"] <= 1.5e9


def test_memory_counts_keys_and_values(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = dry_run(folder, "Llama-3.2-1B", capsys)
    cache = 512 * 16 * 2 * 8 * 64 * 2  # tokens, layers, keys and values, heads, width, bytes
    assert facts["memory for generation"] == facts["weights"] + cache


def test_a_dry_run_reads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(module("safetensors_file").SafetensorsFile, "read", fail)
    with pytest.raises(SystemExit):
        main(["convert", str(folder / "SmolLM2-135M-Instruct"), "--dry-run", "--quantize", "mxfp4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama: 272 of 272 tensors used"
    assert "134.5 million parameters" in lines[1]
    assert lines[2].startswith("about ")
