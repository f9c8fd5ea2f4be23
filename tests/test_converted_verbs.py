"""A person's way: `convert` once, then every verb on the folder, for every family, whole and at 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import janusflow_tools
import llama_tools
import mlx.core as mx
import numpy as np
import pytest
import test_bagel_convert
import test_show_o2_convert
import test_transfusion_pytorch
from converted_tools import convert_by_verb
from family_tools import album, words
from PIL import Image

from mlx_transfusion.model_io import load

FIXTURES = Path(__file__).parent / "fixtures"
CODER = FIXTURES / "kl-sd"
KINDS = (
    "bagel", "janusflow", "llama", "monoformer", "monoformer-clip", "show_o2", "transfusion", "transfusion_pytorch",
)  # fmt: skip
READING = ("describe", "edit")
VERBS = ("generate", "describe", "complete", "edit", "finetune", "distill")
CANNOT = {
    ("llama", "generate"): "model llama only writes text: name a model that paints",
    ("llama", "describe"): "model llama only writes text: name a model that paints",
    ("llama", "edit"): "model llama only writes text: name a model that paints",
    ("llama", "finetune"): "model llama only writes text: give it a picture side first (the verb extend)",
    ("llama", "distill"): "model llama only writes text: give it a picture side first (the verb extend)",
    ("monoformer", "describe"): "this MonoFormer has no vision encoder and cannot read pictures",
    ("monoformer", "edit"): "this MonoFormer has no vision encoder and cannot read pictures",
}
"""What a family cannot do, and what is said then."""


class Place(NamedTuple):
    """Converted models, and what the verbs are given."""

    models: dict[tuple[str, str], Path]
    """By family and kind of weights ("whole", "4 bits")."""
    album: Path
    picture: Path


def checkpoint(kind: str, top: Path, ours: Path) -> list[str | Path]:
    """SOURCE and flags of `convert`: a tiny checkpoint in the format of its family."""
    if kind == "transfusion":
        return [ours]
    if kind == "bagel":
        return [test_bagel_convert.official_folder(top / kind)]
    if kind == "janusflow":
        source = janusflow_tools.official_folder(top / kind)
        return [source, "--autoencoder", janusflow_tools.autoencoder_folder(top / "vae")]
    if kind == "llama":
        model = llama_tools.random_llama(llama_tools.config())
        return [llama_tools.hf_folder(top / kind, model.config, model)]
    if kind == "show_o2":
        return [test_show_o2_convert.official_folder(top / kind)]
    tokens = top / f"{kind}.json"
    if kind == "transfusion_pytorch":
        words(90).save(str(tokens))
        source = test_transfusion_pytorch.latents_folder(
            FIXTURES / "transfusion-pytorch" / "config.json", top / kind
        )
    else:
        words(100).save(str(tokens))
        source = FIXTURES / kind
    return [source, "--autoencoder", CODER, "--tokenizer", tokens]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Place:
    """Every family's tiny checkpoint, converted by the verb; tests do not write here."""
    top = tmp_path_factory.mktemp("converted")
    models = {}
    for kind in KINDS:
        source = checkpoint(kind, top, tiny_model_dir)
        for stored, flags in {"whole": [], "4 bits": ["--quantize", 4, "--group-size", 32]}.items():
            models[kind, stored] = top / stored / kind
            convert_by_verb(*source, *flags, out=models[kind, stored])
    rows = album(top / "album")
    return Place(models, rows, rows / "red.png")


def command(verb: str, place: Place, model: Path, out: Path, method: str = "ect") -> list[str | Path]:
    """A short run of a verb that writes into the folder `out`."""
    chat = ["--chat"] if model.name == "llama" else []
    paint = ["--steps", "2", "--seed", "3", "--output", out / "made.png"]
    if verb == "distill":
        file = out / "student.toml"
        small = 'student = "painter"' if model.name == "transfusion" else "[adapter]\nrank = 2"
        file.write_text(STUDENT.format(out=out, model=model, album=place.album, method=method, small=small))
        return [verb, file]
    return {
        "generate": [verb, "red square", "--preview-every", "1", *paint],
        "describe": [verb, place.picture, "--max-tokens", "4"],
        "complete": [verb, "red square", "--max-tokens", "4", "--max-images", "0", *chat],
        "edit": [verb, place.picture, "blue", *paint],
        "finetune": [
            verb, "--data", place.album, "--output", out / "adapter", "--iters", "1", "--rank", "2",
            "--batch-size", "2", "--preview", "red square", "--preview-every", "1",
        ],
    }[verb] + ["--model", model]  # fmt: skip


STUDENT = """
output = "{out}/run"
tokenizer = "{model}"
steps = 1
batch_size = 2
[data]
caption_first = 1.0
[[data.train]]
rows = "{album}/train.jsonl"
[consistency]
teacher = "{model}"
method = "{method}"
guidance = 2.0
{small}
[sample]
prompts = ["red square"]
every = 1
"""


def check(verb: str, result: Any, out: Path, cli: Callable[..., Any]) -> None:
    """That a verb gave what it promises."""
    assert result.code == 0, result.err
    printed = result.out.splitlines()
    if verb in ("generate", "edit"):
        assert printed == [str(out / "made.png")]
        made = pixels(out / "made.png")
        if verb == "generate":
            first, last = (pixels(out / f"made_step_{step:03}.png") for step in (1, 2))
            assert first.shape == made.shape
            np.testing.assert_array_equal(last, made)  # the estimate of the last step is the picture
    elif verb == "describe":
        assert result.out.count("\n") == 1
    elif verb == "complete":
        assert printed
    else:
        folder = out / "adapter" if verb == "finetune" else out / "run"
        assert {p.name for p in (folder / "samples").iterdir()} == {"step-00000000.png", "step-00000001.png"}
        flags = ["--model", printed[-1], "--seed", 1, "--output", out / "again.png"]
        again = cli("generate", "red square", *flags, *(["--steps", 2] if verb == "finetune" else []))
        assert again.code == 0, again.err
        assert (out / "again.png").is_file()


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


CASES = [(kind, verb) for kind in KINDS for verb in (READING if kind == "monoformer-clip" else VERBS)]


@pytest.mark.parametrize(("kind", "verb"), CASES)
def test_every_verb(kind: str, verb: str, place: Place, tmp_path: Path, cli: Callable[..., Any]) -> None:
    given = command(verb, place, place.models[kind, "whole"], tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    result = cli(*given)
    if (kind, verb) not in CANNOT:
        check(verb, result, tmp_path, cli)
        return
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert CANNOT[kind, verb] in result.err
    assert {p.name for p in tmp_path.iterdir()} == before


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices stay quantised when a model is loaded."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


QUANTISED = [case for case in CASES if case[1] in ("generate", "distill") and case not in CANNOT]


@pytest.mark.parametrize(("kind", "verb"), QUANTISED)
def test_quantised_it_does_the_same(
    kind: str,
    verb: str,
    place: Place,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on_a_gpu(monkeypatch)
    result = cli(*command(verb, place, place.models[kind, "4 bits"], tmp_path, method="scm"))
    check(verb, result, tmp_path, cli)


@pytest.mark.parametrize("kind", ["janusflow", "transfusion"])
@pytest.mark.parametrize("kind_of_training", ["full", "dora", "--quantize"])
def test_quantised_weights_are_trained(
    kind: str, kind_of_training: str, place: Place, tmp_path: Path, cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of them, expanded; their lengths, for DoRA; by QLoRA, which leaves what has few bits already as it is."""
    as_on_a_gpu(monkeypatch)
    given = command("finetune", place, place.models[kind, "4 bits"], tmp_path)
    flags = ["--quantize", 8] if kind_of_training == "--quantize" else ["--type", kind_of_training]
    check("finetune", cli(*given, *flags), tmp_path, cli)


def test_fusing_expands_them(
    place: Place, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    model = place.models["janusflow", "4 bits"]
    assert cli("fuse", "--model", model, "--dequantize", "--output", tmp_path / "whole").code == 0
    assert "quantization" not in load(tmp_path / "whole").extra


def test_the_facts(place: Place, cli: Callable[..., Any]) -> None:
    """`info` counts parts, parameters, bits and memory; the card names licence and source."""
    for (kind, stored), model in place.models.items():
        result = cli("info", model, "--json")
        assert result.code == 0, result.err
        facts = json.loads(result.out)
        parts = facts["parameters"]
        assert parts["total"] == sum(count for name, count in parts.items() if name != "total") > 0
        assert parts["transformer"] > 0
        assert ("autoencoder" in parts) == (kind not in ("llama", "transfusion"))
        index = json.loads((model / "model.safetensors.index.json").read_text())["metadata"]
        assert index["total_parameters"] == parts["total"]
        size = (model / "model.safetensors").stat().st_size
        assert facts["bits a weight on disk"] == round(8 * size / parts["total"], 2)
        assert ("quantization" in facts) == (stored == "4 bits"), kind
        assert {"weights as stored", "float32 (on a CPU)"} == facts["memory for generation"].keys()
        card = (model / "README.md").read_text()
        assert "Converted from" in card
        assert "Licence: " in card


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Its folder would be one that no verb can use; what it would be is told all the same."""
    given = ["convert", FIXTURES / "monoformer", "--autoencoder", CODER]
    result = cli(*given, "--output", tmp_path / "out")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "no tokenizer.json and no tokenizer.model: name one with --tokenizer" in result.err
    assert not list(tmp_path.iterdir())
    assert cli(*given, "--dry-run").code == 0


def test_when_nothing_is_quantised_it_is_said(tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli("convert", CODER, "--quantize", 4, "--dry-run")
    assert result.code == 0
    assert result.err.startswith("note: nothing gets fewer bits: autoencoders stay whole")
    assert cli("convert", CODER, "--dry-run").err == ""
