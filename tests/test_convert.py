"""Converting a state dict with our own names: every tensor is accounted for, every bit is kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.cli import main
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import flat_parameters, load
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer

try:
    from mlx_transfusion.convert import state_dict
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import state_dict

PACKAGE = str(state_dict.__package__)
ROOT = Path(__file__).parents[1]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig,
           tiny_tokenizer: Tokenizer) -> Path:  # fmt: skip
    """A folder with config.json and tokenizer.model; tests do not write into it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tiny_model: Transfusion) -> Weights:
    return flat_parameters(tiny_model)


@pytest.fixture
def convert(inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """`convert(source, dtype=None)`: into the new folder "out"."""

    def run(source: Path, dtype: mx.Dtype | None = None) -> Path:
        return state_dict.convert_state(
            source, inputs / "config.json", inputs / "tokenizer.model", tmp_path / "out", dtype
        )

    return run


def save(file: Path, weights: Weights) -> Path:
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    return file


def save_shards(folder: Path, weights: Weights, count: int = 3) -> Path:
    """As Hugging Face writes them; returns the index."""
    folder.mkdir(exist_ok=True)
    names = sorted(weights)
    places: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save(folder / name, {k: weights[k] for k in names[i::count]})
        places |= dict.fromkeys(names[i::count], name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def stored(folder: Path) -> Weights:
    return dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]


def bits(array: mx.array) -> tuple[mx.Dtype, tuple[int, ...], bytes]:
    return array.dtype, array.shape, bytes(np.array(array.view(mx.uint8)))


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert bits(a[name]) == bits(b[name]), name


# ---- round trips ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_kept(tmp_path: Path, weights: Weights, convert: Callable[..., Path],
                           dtype: str) -> None:  # fmt: skip
    source = {name: value.astype(DTYPES[dtype]) for name, value in weights.items()}
    out = convert(save(tmp_path / "weights.safetensors", source))
    assert_same(stored(out), source)


def test_the_folder_loads_and_computes_the_same(tmp_path: Path, tiny_model: Transfusion, weights: Weights,
                                                convert: Callable[..., Path]) -> None:  # fmt: skip
    loaded = load(convert(save(tmp_path / "weights.safetensors", weights)))
    assert loaded.config == tiny_model.config
    ids, lengths = np.array([[1, 7, 9, 4]]), np.array([4])
    np.testing.assert_array_equal(
        np.array(loaded.model.prefill(ids, lengths)[0]), np.array(tiny_model.prefill(ids, lengths)[0])
    )


def test_shards_by_index_file_and_by_folder(tmp_path: Path, weights: Weights,
                                            convert: Callable[..., Path]) -> None:  # fmt: skip
    index = save_shards(tmp_path / "shards", weights)
    for source in (index, index.parent):
        out = convert(source)
        assert_same(stored(out), weights)
        shutil.rmtree(out)


def test_dtype_is_that_of_the_stored_weights(tmp_path: Path, weights: Weights,
                                             convert: Callable[..., Path]) -> None:  # fmt: skip
    out = convert(save(tmp_path / "weights.safetensors", weights), mx.float16)
    assert_same(stored(out), {name: value.astype(mx.float16) for name, value in weights.items()})


def test_values_beyond_the_dtype_are_refused(tmp_path: Path, weights: Weights,
                                             convert: Callable[..., Path]) -> None:  # fmt: skip
    source = weights | {"norm.weight": 7e4 * mx.ones(weights["norm.weight"].shape)}
    file = save(tmp_path / "weights.safetensors", source)
    with pytest.raises(UserError, match=r"beyond the range of mlx\.core\.float16 in norm\.weight: use"):
        convert(file, mx.float16)
    assert_same(stored(convert(file, mx.bfloat16)), {k: v.astype(mx.bfloat16) for k, v in source.items()})


# ---- every tensor is accounted for ----

EXTRA = st.dictionaries(
    st.from_regex(r"extra[a-z]{0,3}(\.[0-9]{1,2})?", fullmatch=True), st.just(1), max_size=4
)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_exactly_what_is_wrong_is_listed(data: st.DataObject, inputs: Path, weights: Weights) -> None:
    names = sorted(weights)
    missing = data.draw(st.sets(st.sampled_from(names), max_size=len(names)), "missing")
    rest = sorted(set(names) - missing)
    misshapen = data.draw(st.sets(st.sampled_from(rest)) if rest else st.just(set()), "misshapen")
    integer = data.draw(st.sets(st.sampled_from(rest), max_size=2) if rest else st.just(set()), "integer")
    extra = data.draw(EXTRA, "extra")

    source, wrong = dict.fromkeys(extra, mx.zeros(3)), {f"missing {n}" for n in missing}
    wrong |= {f"unexpected {n}" for n in extra}
    for name in rest:
        value = weights[name]
        if name in misshapen:
            value = mx.concatenate([value, value])
            wrong.add(f"{name} has shape {list(value.shape)}, expected {list(weights[name].shape)}")
        if name in integer:
            value = value.astype(mx.int32)
            wrong.add(f"{name} has dtype I32, expected a floating-point one")
        source[name] = value
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        # mlx does not write a file without tensors.
        file = save(Path(folder) / "w.safetensors", source or {"extra": mx.zeros(1)})
        if not source:
            wrong.add("unexpected extra")
        arguments = file, inputs / "config.json", inputs / "tokenizer.model", out
        if wrong:
            with pytest.raises(UserError) as caught:
                state_dict.convert_state(*arguments)
            listed = str(caught.value).split("does not fit ")[1].split(": ", 1)[1].split("; ")
            assert len(listed) == len(wrong)
            assert set(listed) == wrong
            assert [p.name for p in Path(folder).iterdir()] == [file.name]
        else:
            state_dict.convert_state(*arguments)
            assert_same(stored(out), weights)


def test_a_shard_that_disagrees_with_its_index_is_named(tmp_path: Path, weights: Weights,
                                                        convert: Callable[..., Path]) -> None:  # fmt: skip
    index = save_shards(tmp_path / "shards", weights)
    places = json.loads(index.read_text())["weight_map"]
    name = sorted(weights)[0]
    for changed in (
        {k: v for k, v in places.items() if k != name},  # a tensor that the index does not know
        places | {"ghost": places[name]},  # one that the file does not have
        places | {name: places[sorted(weights)[1]]},  # one that is in another file
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UserError, match="does not agree with model-0000"):
            convert(index)


# ---- torch ----


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip(
        "torch", reason="torch is not installed: its checkpoints cannot be written here"
    )


def to_torch(torch: Any, array: mx.array) -> Any:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_keep_every_bit(tmp_path: Path, weights: Weights, convert: Callable[..., Path],
                                    torch: Any, dtype: str, suffix: str) -> None:  # fmt: skip
    source = {name: value.astype(DTYPES[dtype]) for name, value in weights.items()}
    state = {name: to_torch(torch, value) for name, value in source.items()}
    name = "embed_tokens.weight"
    state[name] = state[name].t().contiguous().t()  # as after a transposition: not in order of memory
    torch.save(state, tmp_path / f"model{suffix}")
    assert_same(stored(convert(tmp_path / f"model{suffix}")), source)


class Attack:
    """What unpickling calls: it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, convert: Callable[..., Path],
                                                   torch: Any) -> None:  # fmt: skip
    marker = tmp_path / "ran"
    torch.save({"norm.weight": Attack(marker)}, tmp_path / "new.pt")
    torch.save({"a": Attack(marker)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Attack(marker), protocol=2))
    for name in ("new.pt", "old.pth", "raw.bin"):
        with pytest.raises(UserError, match=r"refused: it holds \S*mkdir, which could run code") as caught:
            convert(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's own message tells how to run the code
        assert not marker.exists()
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert marker.exists()  # the attack works where it is let through


def test_other_torch_files_are_named(tmp_path: Path, convert: Callable[..., Path], torch: Any) -> None:
    cases = {
        "nested": ({"state_dict": {}, "epoch": 3}, r"not a plain state dict \(state_dict, epoch\)"),
        "list": ([torch.zeros(1)], "holds a list, expected a state dict"),
        "double": (
            {"norm.weight": torch.zeros(1, dtype=torch.float64)},
            "norm.weight has dtype F64, expected a fl",
        ),
        "sparse": ({"a": torch.eye(2).to_sparse()}, "a: not a plain tensor"),
    }
    for name, (value, message) in cases.items():
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=message):
            convert(tmp_path / f"{name}.pt")
    for data in (b"", b"hello", (tmp_path / "list.pt").read_bytes()[:100]):
        (tmp_path / "cut.pt").write_bytes(data)
        with pytest.raises(UserError, match="damaged or no state dict"):
            convert(tmp_path / "cut.pt")


def test_without_torch_one_line_says_what_to_do(tmp_path: Path, convert: Callable[..., Path],
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pt").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"needs torch: pip install 'mlx-transfusion\[torch\]', or save"):
        convert(tmp_path / "model.pt")


# ---- bad input, and nothing half written ----


def test_bad_sources(tmp_path: Path, weights: Weights, convert: Callable[..., Path]) -> None:
    good = save(tmp_path / "weights.safetensors", weights).read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save(tmp_path / "two" / f"{name}.safetensors", weights)
    files: dict[str, tuple[bytes, str]] = {
        "cut.safetensors": (good[:-8], "cannot read the weights"),
        "none.safetensors": (b"", "cannot read the weights"),
        "weights.npz": (good, r"expected a \.safetensors"),
        "list.index.json": (b"[]", "not a weight index"),
        "bad.index.json": (b"{", "not a weight index"),
        "out.index.json": (b'{"weight_map": {"a": "../weights.safetensors"}}', "not the name of a file"),
        "void.index.json": (b'{"weight_map": {"a": ""}}', "not the name of a file"),
        "gone.index.json": (b'{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: no such file"),
        "self.index.json": (b'{"weight_map": {"a": "self.index.json"}}', r"expected a \.safetensors"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    cases = {name: message for name, (_, message) in files.items()}
    cases |= {"absent.pt": "no such file", "empty": "holds no", "two": r"holds 2 checkpoints \(a\.safe"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            convert(tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_bad_configs_and_tokenizers(tmp_path: Path, inputs: Path, weights: Weights,
                                    tiny_config: ModelConfig) -> None:  # fmt: skip
    source = save(tmp_path / "weights.safetensors", weights)
    good = tiny_config.to_dict()
    for content, message in (
        ("{", "not valid JSON"),
        ("[1]", "expected an object, found list"),
        (json.dumps(good | {"hiden_size": 1}), 'unknown key "hiden_size"; did you mean "hidden_size"'),
        (
            json.dumps(good | {"vocab_size": 100}),
            r"embed_tokens\.weight has shape \[288, 32\], expected \[100, 32\]",
        ),
        (json.dumps(good | {"num_hidden_layers": 1}), r"unexpected layers\.1\.input_layernorm\.weight"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            state_dict.convert_state(
                source, tmp_path / "config.json", inputs / "tokenizer.model", tmp_path / "out"
            )
    with pytest.raises(UserError, match="no such tokenizer file"):
        state_dict.convert_state(source, inputs, tmp_path / "tokenizer.model", tmp_path / "out")
    with pytest.raises(UserError, match="cannot read the config"):
        state_dict.convert_state(source, tmp_path / "absent.json", inputs, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "weights.safetensors"]


def test_an_existing_output_stays_as_it_is(tmp_path: Path, weights: Weights,
                                           convert: Callable[..., Path]) -> None:  # fmt: skip
    source = save(tmp_path / "weights.safetensors", weights)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(source)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, weights: Weights,
                                                convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
                                                error: BaseException) -> None:  # fmt: skip
    source = save(tmp_path / "weights.safetensors", weights)

    def fail(writer: Any, *_: Any, **__: Any) -> None:
        writer._begin()  # a file is half written
        raise error

    monkeypatch.setattr(state_dict.convert.__globals__["ShardWriter"], "write", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(source)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_an_output_that_cannot_be_made(tmp_path: Path, inputs: Path, weights: Weights) -> None:
    source = save(tmp_path / "weights.safetensors", weights)
    with pytest.raises(UserError, match="cannot write the model: Not a directory"):
        state_dict.convert_state(source, inputs, inputs, source / "out")


# ---- the command ----


def test_the_command(tmp_path: Path, inputs: Path, weights: Weights,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    source = save(tmp_path / "weights.safetensors", weights)
    arguments = [source, "--config", inputs / "config.json", "--tokenizer", inputs / "tokenizer.model"]
    out = ["--output", tmp_path / "out", "--dtype", "float16"]
    command = [sys.executable, "-m", PACKAGE, *map(str, [*arguments, *out])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"transfusion: {len(weights)} of {len(weights)} tensors used\n")
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert {v.dtype for v in stored(tmp_path / "out").values()} == {mx.float16}

    for flags, message in (
        (out, "exists already"),
        ([], "--output"),
        (["--output", tmp_path / "new", "--dtype", "int3"], "int3"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["convert", *map(str, [*arguments, *flags])])
        said = capsys.readouterr()
        assert (caught.value.code, said.out) == (2, "")
        assert said.err.startswith("error: ")
        assert message in said.err
        assert said.err.count("\n") == 1
