"""Building shards: what stands in them, that a build can be killed anywhere, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from shard_tools import build_both, write_inputs, write_tar

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.shards.build import build, check, in_processes
from mlx_transfusion.shards.packing import Tokens, pack
from mlx_transfusion.shards.recipe import make_recipe
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.image_store import ImageFolder, ImageRef
from mlx_transfusion.training.shard_files import PAIR, TEXT, ShardFolder

INPUTS = ["pairs-0.tar", "pairs-1.tar", "text-0.jsonl.gz", "text-1.txt"]
REF = ImageRef(ImageFolder(Path()), "x.png")


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    path = write_inputs(tmp_path_factory.mktemp("shards"), tiny_tokenizer)
    build_both(path)
    return path


def build_all(toml: Path, folder: Path, names: list[str] = INPUTS, processes: int = 1) -> dict[str, Any]:
    recipe = make_recipe(load_train_config(toml))
    return build(recipe, folder, [toml.parent / name for name in names], in_processes(processes))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_what_a_shard_holds(toml: Path, tiny_tokenizer: Tokenizer) -> None:
    folder, length = ShardFolder(toml.parent / "pairs"), 32
    s, patches = tiny_tokenizer.special, 4
    captions, pictures = [], []
    for n in range(len(folder)):
        one = folder.sequence(n)
        assert one.lengths.sum() == len(one.tokens) == length
        at = picture = 0
        for kind, size in zip(one.kinds, one.lengths, strict=True):
            ids = one.tokens[at : at + size].tolist()
            at += size
            if kind == PAIR:
                assert (ids[0], *ids[-patches - 3 :]) == (s.bos, s.boi, *[s.pad] * patches, s.eoi, s.eos)
                captions.append(tiny_tokenizer.decode(ids))
                pictures.append(one.pictures[picture, 0])
                picture += 1
        assert picture == len(one.pictures)
    rows = [json.loads(line) for line in (toml.parent / "pairs.jsonl").read_text().splitlines()]
    expected = {r["text"]: np.array(Image.open(toml.parent / "pictures" / r["image"])) for r in rows}
    assert sorted(captions) == sorted(expected)
    for caption, picture in zip(captions, pictures, strict=True):
        np.testing.assert_array_equal(picture, expected[caption])


def test_texts_are_cut_where_their_sequence_ends(toml: Path, tiny_tokenizer: Tokenizer) -> None:
    s = tiny_tokenizer.special
    shard = load_file(toml.parent / "text/shard-00000.safetensors")
    texts = [json.loads(line)["text"] for line in (toml.parent / "texts.jsonl").read_text().splitlines()]
    stream = [i for t in texts for i in (s.bos, *tiny_tokenizer.encode(f"{t} {t} {t}"), s.eos)]
    found = shard["tokens"].reshape(-1).tolist()
    assert found == (stream + stream)[: len(found)]
    assert 0 <= len(found) - len(stream) < 32  # only the last sequence is filled up
    assert shard["pictures"].shape == (0, 1, 8, 8, 3)
    index = json.loads((toml.parent / "text/index.json").read_text())
    assert index["shards"][0]["repeated"] == len(found) - len(stream)


DOCUMENTS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30)


@given(DOCUMENTS, st.integers(40, 64))
@settings(max_examples=50, deadline=None)
def test_packing(documents: list[tuple[int, bool]], length: int) -> None:
    """Sequences are full; a document with a picture stands there once and whole, a text once and in order."""
    ids = iter(range(10**6))
    made = [
        Tokens(
            np.array([next(ids) for _ in range(size)], np.int32), PAIR if p else TEXT, (REF,) if p else (), i
        )
        for i, (size, p) in enumerate(documents)
    ]
    caption = Tokens(np.array([-1, -2, -3], np.int32), TEXT, (), 0)
    packed = pack(made, [caption], length)
    assert {sum(len(d.ids) for d in s) for s in packed.sequences} == {length}
    pieces = [d for s in packed.sequences for d in s]
    whole = sorted(d.origin for d in pieces if d.pictures)
    assert whole == [d.origin for d in made if d.pictures]
    texts = [i for d in made if not d.pictures for i in d.ids.tolist()]
    stream = [i for d in pieces if not d.pictures for i in d.ids.tolist()]
    assert len(stream) - len(texts) == packed.repeated >= 0
    if texts:
        assert stream == (texts * (len(stream) // len(texts) + 1))[: len(stream)]
        assert packed.repeated < length or any(d.pictures for d in made)
    else:
        assert set(stream) <= {-1, -2, -3}


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_places_are_a_permutation(n: int, seed: int, epoch: int) -> None:
    found = noise.place(seed, epoch, n, np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(noise.place(seed, epoch, n, some), found[some])


def test_places_look_random() -> None:
    n = 1 << 12
    a, b = (noise.place(0, epoch, n, np.arange(n)) for epoch in range(2))
    for x, y in ((a, np.arange(n)), (a, b), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / n**0.5
    assert 0.9 < (a == b).sum() * 1.0 + 0.95 < 8  # about one fixed point is expected


def test_processes_make_the_same_bytes(toml: Path, tmp_path: Path) -> None:
    build_all(toml, tmp_path / "one")
    build_all(toml, tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert check(tmp_path / "two") == []


def test_ray_makes_the_same_bytes(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data", reason="ray is not installed (pip install 'mlx-transfusion[ray]')")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # at its default of 15 a busy machine starves its workers
    from mlx_transfusion.shards.ray_build import on_ray

    recipe = make_recipe(load_train_config(toml))
    build_all(toml, tmp_path / "one")
    sources = [toml.parent / name for name in INPUTS]
    build(recipe, tmp_path / "ray", sources, on_ray())
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"broken.jsonl:1: not valid JSON"):
        build(recipe, tmp_path / "other", [tmp_path / "broken.jsonl"], on_ray())


SLOW = """
import sys, time
import mlx_transfusion.shards.shard as shard
import mlx_transfusion.shards.build as building
write = shard.write_whole
def slow(target, action):
    time.sleep(0.15)
    write(target, lambda file: (action(file), time.sleep(0.15)))
shard.write_whole = building.write_whole = slow
from mlx_transfusion.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("shards", [0, 3])
def test_killed_and_started_again(shards: int, toml: Path, tmp_path: Path) -> None:
    """SIGKILL while shard number `shards` is written; what was finished stays, and the bytes are the same."""
    build_all(toml, tmp_path / "whole")
    folder = tmp_path / "killed"
    words = ["shards", "build", toml, *(toml.parent / name for name in INPUTS), "--output", folder]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, words)], stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not list(folder.glob(f".shard-{shards:05d}.safetensors.partial-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(UserError, match="one that is not finished"):
        ShardFolder(folder)
    done = {p: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    assert len(done) == 2 * shards
    build_all(toml, folder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in done} == done


def test_damage_is_found_and_built_again(toml: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    shutil.copytree(toml.parent / "pairs", tmp_path / "pairs")
    file = tmp_path / "pairs/shard-00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = cli("shards", "check", tmp_path / "pairs")
    assert done.code == 2
    assert "shard-00001.safetensors: does not have the check sum" in done.err
    file.write_bytes(data[:100])
    folder = ShardFolder(tmp_path / "pairs")
    with pytest.raises(UserError, match=r"shard-00001.*run shards check"):
        folder.sequence(len(folder) - 1)
    file.unlink()
    build_all(toml, tmp_path / "pairs", INPUTS[:2])
    assert file.read_bytes() == data
    assert cli("shards", "check", tmp_path / "pairs").code == 0


def test_other_inputs_and_other_recipes_are_refused(toml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(toml.parent / "pairs", folder)
    before = contents(folder)
    with pytest.raises(UserError, match=r"was built from pairs-0.tar .*same inputs in the same order"):
        build_all(toml, folder, ["pairs-1.tar", "pairs-0.tar"])
    with pytest.raises(UserError, match="of a build with more inputs"):
        build_all(toml, folder, ["pairs-0.tar"])
    recipe = make_recipe(load_train_config(toml, ["sequence_length=64"]))
    with pytest.raises(UserError, match="have sequence_length 32, this build has 64"):
        build(recipe, folder, [toml.parent / "pairs-0.tar"], in_processes(1))
    assert contents(folder) == before
    build_all(toml, folder, INPUTS)  # new inputs behind the old ones
    assert len(ShardFolder(folder).shards) == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_rows(processes: int, toml: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(toml.parent / "pictures", pictures)
    (pictures / "red-star.png").write_bytes((pictures / "red-star.png").read_bytes()[:60])
    rows = [{"image": f"red-{s}.png", "text": f"red {s}"} for s in ("heart", "star", "moon")]
    rows.append({"image": "blue-moon.png", "text": "blue moon " * 40})
    tar = write_tar(tmp_path / "bad.tar", pictures, rows)
    words = ["shards", "build", toml, tar, toml.parent / "text-1.txt", "--processes", processes, "--output"]
    done = cli(*words, tmp_path / "out")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert "bad.tar:4" in done.err or "red-star.png" in done.err
    assert not list((tmp_path / "out").glob("*.safetensors")) or processes == 2
    done = cli(*words, tmp_path / "out2", "--set", "data.skip_bad_rows=true")
    assert done.code == 0, done.err
    assert "10 rows (2 bad ones left out)" in done.err
    record = json.loads((tmp_path / "out2/shard-00000.json").read_text())
    assert [line.partition(": ")[0] for line in record["bad"]] == [
        f"{tar}/00/red-star.png ({tar}:2)",
        f"{tar}:4",
    ]


def test_bad_requests(toml: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "edits.jsonl").write_text(
        json.dumps({"source": "a.png", "instruction": "b", "target": "a.png"})
    )
    shutil.copy(toml.parent / "pictures/red-moon.png", tmp_path / "a.png")
    (tmp_path / "cut.jsonl.gz").write_bytes((toml.parent / "text-0.jsonl.gz").read_bytes()[:50])
    latents = ("--set", "model.image_channels=4", "--set", "model.image_mean=[0.0, 0.0, 0.0, 0.0]")
    for words, told in (
        ([tmp_path / "edits.jsonl"], "edits are no part of shards"),
        ([tmp_path / "cut.jsonl.gz"], "cut.jsonl.gz: cannot read"),
        ([tmp_path / "none.tar"], "none.tar: no such file of rows"),
        ([toml.parent / "text-1.txt", "--flips"], "--flips is for latents"),
        ([toml.parent / "text-1.txt", "--dtype", "int8"], '--dtype "int8"'),
        ([toml.parent / "text-1.txt", *latents], "data.autoencoder"),
    ):
        done = cli("shards", "build", toml, *words, "--output", tmp_path / "out")
        assert done.code == 2
        assert told in done.err, done.err
        assert os.linesep not in done.err.strip()
    assert cli("shards", "check", tmp_path).code == 2
