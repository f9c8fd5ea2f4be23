"""What a user can name as SOURCE: files, folders, shards of two kinds, and repositories of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import toy_family
from convert_package import assert_same, module
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError

sources, hub, account, run = (module(name) for name in ("sources", "hub", "account", "run"))
NAMES = st.text("ab.", min_size=1, max_size=3)


def test_the_usual_file_of_several(tmp_path: Path) -> None:
    for name, value in (("model", 1.0), ("model.fp16", 2.0), ("other", 3.0)):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), {"a": mx.array([value])})
    assert sources.Source(tmp_path).open().read("a").item() == 1
    assert sources.Source(tmp_path / "other.safetensors").open().read("a").item() == 3
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds 2 checkpoints \(model\.fp16\.safetensors, other\.safetensors\)"
    ):
        sources.Source(tmp_path).open()
    assert sources.Source(tmp_path).names() == frozenset()
    assert sources.Source(tmp_path).names("other.safetensors") == {"a"}


def test_a_checkpoint_is_opened_once(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    assert source.open("ae.safetensors") is source.open("ae.safetensors")
    assert source.has("ae.safetensors")
    assert not source.has("vae")
    assert source.json() == {}
    assert sources.Source(tmp_path / "in" / "ae.safetensors").folder == tmp_path / "in"


def test_tokenizer_files(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (tmp_path / "model" / name).write_text("{}")
    source = sources.Source(tmp_path / "model")
    assert source.tokenizer_files().keys() == {"tokenizer.json", "tokenizer_config.json"}
    alone = sources.Source(tmp_path / "model", tokenizer=tmp_path / "model" / "tokenizer.json")
    assert alone.tokenizer_files() == {"tokenizer.json": tmp_path / "model" / "tokenizer.json"}
    for called, name in (("words.json", "tokenizer.json"), ("pieces.model", "tokenizer.model")):
        file = tmp_path / called
        file.touch()
        assert sources.Source(tmp_path / "model", tokenizer=file).tokenizer_files() == {name: file}
    (tmp_path / "words.txt").touch()
    with pytest.raises(
        UserError, match=r"words\.txt: expected a tokenizer\.json or a tokenizer\.model as --tok"
    ):
        sources.Source(tmp_path / "model", tokenizer=tmp_path / "words.txt").tokenizer_files()


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip(
        "torch", reason="torch is not installed: its checkpoints cannot be written here"
    )


def test_sharded_torch_files_convert_as_safetensors_do(tmp_path: Path, torch: Any) -> None:
    source = toy_family.write(tmp_path / "in", mx.bfloat16, optional=False)
    options = module("quantize").Options()
    expected = run.convert(account.account(toy_family.plan(source), options), tmp_path / "expected")
    model, _ = toy_family.tensors(mx.bfloat16, optional=False)
    names = sorted(model)
    places = {}
    for i in range(2):
        shard = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        part = {n: torch.tensor(model[n].astype(mx.float32).tolist()).to(torch.bfloat16) for n in names[i::2]}
        torch.save(part, tmp_path / "in" / shard)
        places |= dict.fromkeys(part, shard)
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    parts = {"": source.open("pytorch_model.bin.index.json"), "vae.": source.open("ae.safetensors")}
    out = run.convert(account.account(toy_family.plan(source, parts=parts), options), tmp_path / "out")
    assert_same(mx.load(str(out / "model.safetensors")), mx.load(str(expected / "model.safetensors")))


def test_unused_numbers_of_any_kind_are_let_pass(tmp_path: Path, torch: Any) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.float64), "b": torch.ones(2)}, tmp_path / "a.pt")
    opened = sources.open_checkpoint(tmp_path / "a.pt")
    assert opened.tensors["a"].dtype == "F64"
    assert opened.read("b").tolist() == [1, 1]
    with pytest.raises(UserError, match=r"a: has dtype torch\.float64: save it as"):
        opened.read("a")


# ---- the hub ----

FILES = [
    "README.md", "config.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "tokenizer.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "ema/model.safetensors", "gguf/a-Q4.gguf",
    "gguf/a-Q8.gguf", "old/pytorch_model-00001-of-00001.bin", "old/pytorch_model.bin.index.json", "code/run.py",
]  # fmt: skip


@pytest.mark.parametrize(
    ("inside", "files"),
    [
        ("", {"config.json", "model.safetensors", "tokenizer.json"}),
        ("vae", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
        ("gguf/a-Q4.gguf", {"gguf/a-Q4.gguf"}),
        ("old", {"old/pytorch_model-00001-of-00001.bin", "old/pytorch_model.bin.index.json"}),
        ("code", set()),
        ("nowhere", set()),
    ],
)
def test_only_what_is_needed_is_fetched(inside: str, files: set[str]) -> None:
    assert set(hub.wanted(FILES, inside)) == files


@settings(deadline=None, max_examples=50)
@given(st.lists(NAMES, max_size=6), NAMES)
def test_code_is_never_fetched(names: list[str], inside: str) -> None:
    files = [n + e for n in names for e in (".py", ".safetensors", ".bin", ".json")]
    assert not [f for f in hub.wanted(files, inside) if f.endswith(".py")]


def test_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda _: FILES))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.locate("org/Name-1B") == tmp_path
    assert hub.locate("org/Name-1B/vae") == tmp_path / "vae"
    assert asked == [
        ("org/Name-1B", ["config.json", "model.safetensors", "tokenizer.json"]),
        ("org/Name-1B", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]),
    ]
    with pytest.raises(UserError, match="org/Name-1B: holds no weights in code that can be converted"):
        hub.locate("org/Name-1B/code")


def test_an_output_that_exists_is_told_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def fail(*_: Any) -> Path:
        raise AssertionError("it is downloaded")

    monkeypatch.setattr(hub, "_download", fail)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "org/Name-1B", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import huggingface_hub

    def fail(_: str) -> None:
        raise OSError("Could not reach the hub\nand a second line")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=fail))
    for source, message in (
        (
            "org/Name-1B",
            "org/Name-1B: no such file or folder, and the Hugging Face hub cannot give it: Could not",
        ),
        ("nowhere", "nowhere: no such file or folder: give a checkpoint, or"),
        (str(tmp_path / "gone.safetensors"), "gone.safetensors: no such file or folder"),
        ("./org/Name", "./org/Name: no such file or folder: give"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", source, "--output", str(tmp_path / "out")])
        said = capsys.readouterr()
        assert (stop.value.code, said.out) == (2, "")
        assert message in said.err
        assert said.err.count("\n") == 1
