"""Files from strangers: safetensors headers and configs that lie. One clear line, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import janusflow_tools
import mlx.core as mx
import numpy as np
import pytest
from convert_package import assert_same, module, noise
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError

files, sources, families = module("safetensors_file"), module("sources"), module("families")
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with one tensor of each kind that mlx writes."""
    file = tmp_path_factory.mktemp("good") / "a.safetensors"
    weights = {
        "w": noise((3, 5), 0),
        "half": noise((4,), 1, mx.bfloat16),
        "empty": mx.zeros((0, 3)),
        "one": mx.array(2),
    }
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    return file.read_bytes()


# ---- safetensors ----


@pytest.mark.parametrize("dtype", [d for d, (_, ours) in files.DTYPES.items() if ours is not None])
def test_every_type_is_read_as_mlx_reads_it(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "a.safetensors"
    size = 6 * np.dtype(files.DTYPES[dtype][0]).itemsize
    data = np.random.default_rng(0).integers(0, 2, size, np.uint8).tobytes()
    file.write_bytes(file_of({"a": tensor(dtype, (2, 3), (0, size))}, data))
    opened = files.SafetensorsFile(file)
    assert opened.tensors["a"].nbytes == size
    assert_same({"a": opened.read("a")}, mx.load(str(file)))


def test_types_without_numbers_of_ours_are_known_but_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(
        file_of({"a": tensor("F64", (1,), (0, 8)), "b": tensor("F32", (2,), (8, 16))}, bytes(16))
    )
    opened = files.SafetensorsFile(file)
    assert opened.tensors["a"].dtype == "F64"
    assert opened.read("b").tolist() == [0, 0]
    with pytest.raises(UserError, match="a has dtype F64: save it as F32, F16 or BF16"):
        opened.read("a")


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too few for a header"),
    "seven bytes": (b"1234567", "too few for a header"),
    "a long header": (struct.pack("<Q", 1 << 40) + b"{}", "should have 1099511627776 bytes"),
    "a header longer than the file": (struct.pack("<Q", 3) + b"{}", "should have 3 bytes"),
    "no JSON": (file_of(b"{'a': 1}"), "not valid JSON"),
    "no text": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (file_of([]), "no object"),
    "deep": (file_of(b"[" * 100_000), "not valid JSON"),
    "a long number": (file_of(b'{"a": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    "a name twice": (file_of(b'{"a": 1, "a": 1}'), "a name stands twice"),
    "a number for a tensor": (file_of({"a": 1}), "must have dtype, shape and data_offsets"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "must have dtype"),
    "an unknown dtype": (file_of({"a": tensor("F4")}, bytes(8)), "unknown dtype F4"),
    "a list for a dtype": (file_of({"a": tensor() | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "a negative size": (file_of({"a": tensor(shape=(-2,))}, bytes(8)), r"has the shape \[-2\]"),
    "a size that is true": (file_of({"a": tensor(shape=(True, 2))}, bytes(8)), "has the shape"),
    "a huge size": (file_of({"a": tensor(shape=(1 << 61, 1 << 61))}, bytes(8)), "shape and dtype need"),
    "too large a shape": (file_of({"a": tensor(shape=(3,))}, bytes(8)), "takes 8 bytes .* need 12"),
    "offsets the wrong way": (file_of({"a": tensor(offsets=(8, 0))}, bytes(8)), "has the offsets"),
    "three offsets": (file_of({"a": tensor(offsets=(0, 8, 8))}, bytes(8)), "has the offsets"),
    "an offset beyond the end": (file_of({"a": tensor(offsets=(8, 16))}, bytes(8)), "begins at byte 8"),
    "overlapping tensors": (file_of({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "b begins at byte 4"),
    "a gap": (file_of({"a": tensor(), "b": tensor(offsets=(9, 17))}, bytes(17)), "b begins at byte 9"),
    "a cut file": (file_of({"a": tensor()}, bytes(7)), "its tensors take 8 bytes and the file has 7"),
    "more than announced": (file_of({"a": tensor()}, bytes(9)), "its tensors take 8 bytes and the file has 9"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    data, message = LIES[lie]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"cannot read the weights: .*{message}.*: copy or download"):
        sources.open_checkpoint(file)


def clear(error: UserError) -> None:
    """A message is one line of a length that a person reads."""
    assert "\n" not in str(error)
    assert len(str(error)) < 30_000


def check(folder: Path, data: bytes) -> None:
    """A file is read whole, or refused in one line."""
    file = folder / "fuzz.safetensors"
    file.write_bytes(data)
    try:
        opened = sources.open_checkpoint(file)
        for name, info in opened.tensors.items():
            if files.DTYPES[info.dtype][1] is not None:
                assert opened.read(name).nbytes == info.nbytes
    except UserError as error:
        clear(error)


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_fuzzed_bytes(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        kind = data.draw(st.sampled_from(["cut", "set", "insert", "delete"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "delete":
            del changed[at : at + data.draw(st.integers(1, 9))]
        else:
            end = at + 1 if kind == "set" else at
            changed[at:end] = data.draw(st.binary(min_size=1, max_size=4))
    check(tmp_path, bytes(changed))


NUMBERS = st.one_of(
    st.integers(-2, 20), st.sampled_from([1 << 31, 1 << 63, 1 << 64, 1e300, 0.5, True, None, "3"])
)
LISTS = st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS)
TENSORS = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from([*files.DTYPES, "F3", "", 7, None]), "shape": LISTS, "data_offsets": LISTS,
                  "more": st.none()},
)  # fmt: skip


@settings(FUZZ, max_examples=200)
@given(st.dictionaries(st.text(max_size=5), st.one_of(TENSORS, LISTS), max_size=3), st.binary(max_size=24))
@example({"a": tensor()}, bytes(8))
def test_fuzzed_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    check(tmp_path, file_of(header, data))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(file_of({"a": tensor()}, bytes(8)))
    opened = files.SafetensorsFile(file)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(UserError, match="a is cut short: the file changed"):
        opened.read("a")


# ---- which family, and its config ----


def test_a_wrong_architecture_is_told_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"encoder.conv1.weight": mx.zeros((2, 2))})
    for flags, message in (
        ([], r"no known family of checkpoints (config.json says whisper)"),
        (["--family", "whisper"], '--family: "whisper" is unknown, expected one of '),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path), "--output", str(tmp_path / "out"), *flags])
        said = capsys.readouterr()
        assert (stop.value.code, said.out) == (2, "")
        assert message in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        for family in families.converters():
            assert family.name in said.err
    assert not (tmp_path / "out").exists()


def test_a_family_named_for_another_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"encoder.conv1.weight": mx.zeros((2, 2))})
    run, options = module("run"), module("quantize").Options()
    for family in families.converters():
        with pytest.raises(UserError) as caught:
            run.plan_of(sources.Source(tmp_path), options, family.name)
        assert "\n" not in str(caught.value)


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "intermediate_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
}  # fmt: skip
JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([1 << 40, -1.5, 1e308, "", "x", "silu"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small checkpoints of many families, each with its configs."""
    top = tmp_path_factory.mktemp("checkpoints")
    names = ("bagel", "kl-8ch", "kl-flux", "monoformer", "monoformer-clip", "show-o2", "transfusion-pytorch")
    for name in names:
        shutil.copytree(FIXTURES / name, top / name, ignore=shutil.ignore_patterns("io.*"))
    janusflow_tools.official_folder(top / "janusflow")
    (top / "llama").mkdir()
    (top / "llama" / "config.json").write_text(json.dumps(LLAMA))
    plan = module("synthetic").plan_from_config(top / "llama")
    module("synthetic").write_zeros(plan)
    return sorted(top.iterdir())


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(deep for key, part in inner for deep in places(part, (*way, key)))]


def test_a_config_with_a_trillion_layers(tmp_path: Path) -> None:
    config = {"model_type": "llama", "text": {"num_hidden_layers": 1 << 40}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers is 1099511627776, expected at most 1000"):
        families.find(sources.Source(tmp_path))


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_fuzzed_configs(tmp_path_factory: pytest.TempPathFactory, checkpoints: list[Path],
                        data: st.DataObject) -> None:  # fmt: skip
    folder = data.draw(st.sampled_from(checkpoints))
    file = data.draw(st.sampled_from(sorted(p for p in folder.glob("*.json") if p.name != "tokenizer.json")))
    config = json.loads(file.read_text())
    way = data.draw(st.sampled_from(places(config)[1:]))
    place = config
    for key in way[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        del place[way[-1]]
    else:
        place[way[-1]] = data.draw(JUNK)
    copy = tmp_path_factory.mktemp("config")
    for other in folder.iterdir():
        (copy / other.name).symlink_to(other)
    (copy / file.name).unlink()
    (copy / file.name).write_text(json.dumps(config))
    try:
        module("run").plan_of(
            sources.Source(copy, autoencoder=FIXTURES / "kl-sd"), module("quantize").Options()
        )
    except UserError as error:
        clear(error)
