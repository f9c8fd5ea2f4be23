"""Tables of tensors: operations move numbers and change none; a folder converted back has the bits it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import toy_family
from convert_package import assert_same, bits, module, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.errors import UserError

table, account, run = module("table"), module("account"), module("run")
quantize = module("quantize")
OPTIONS = quantize.Options()

# ---- operations ----


@st.composite
def operations(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    """Any operation, and a shape that it fits."""
    split = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    axes = tuple(draw(st.permutations(range(len(split)))))
    cut = draw(st.integers(0, len(split)))
    shape = (int(np.prod(split[:cut])), int(np.prod(split[cut:])))
    merge = draw(st.sampled_from([None, (int(np.prod(split)),), (int(np.prod(split)), 1)]))
    if draw(st.booleans()):
        return table.Op(None, axes, merge), split
    return table.Op(split, axes if draw(st.booleans()) else None, merge), shape


@settings(deadline=None, max_examples=100)
@given(operations(), st.sampled_from([mx.float32, mx.float16, mx.bfloat16, mx.uint32]))
def test_back_gives_the_same_bits(case: tuple[Any, tuple[int, ...]], dtype: mx.Dtype) -> None:
    op, shape = case
    x = mx.array(np.random.default_rng(0).integers(0, 1 << 15, shape), dtype)
    there = op.apply(x)
    assert there.shape == op.shape(shape)
    assert bits(op.back(there, shape)) == bits(x)


def test_an_operation_that_does_not_fit_is_refused() -> None:
    for op, shape in ((table.CONV2D, (3, 4)), (table.reshape(5), (2, 3)), (table.Op((2, 2)), (6,))):
        with pytest.raises(ValueError, match="shape"):
            op.shape(shape)
    with pytest.raises(ValueError, match="needs a reason"):
        table.Entry("a", None, (1,))
    with pytest.raises(ValueError, match="cannot be optional"):
        table.Entry("a", "b", (1,), optional=True)


def test_layouts() -> None:
    w = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32)
    same = np.testing.assert_array_equal
    same(table.CONV2D.apply(mx.array(w)), w.transpose(0, 2, 3, 1))
    same(table.CONV_TRANSPOSE2D.apply(mx.array(w)), w.transpose(1, 2, 3, 0))
    same(table.CONV1D.apply(mx.array(w[0])), w[0].transpose(0, 2, 1))
    same(table.CONV3D.apply(mx.array(w[..., None])), w[..., None].transpose(0, 2, 3, 4, 1))
    same(table.TRANSPOSE.apply(mx.array(w[0, 0])), w[0, 0].T)


def test_a_convolution_as_a_matrix_gives_the_same_picture() -> None:
    conv = nn.Conv2d(3, 5, 2, stride=2, bias=False)
    x = noise((1, 4, 4, 3), 0)
    foreign = conv.weight.transpose(0, 3, 1, 2)
    matrix = table.patch_matrix(5, 3, 2).apply(foreign)
    patches = x.reshape(1, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2, 2, 12)
    np.testing.assert_allclose(patches @ matrix.T, conv(x), atol=1e-5)


def test_reordered_columns_take_reordered_inputs() -> None:
    w, x = noise((4, 3, 2, 2), 0), noise((3, 2, 2), 1)
    ours = table.reorder_columns(4, (3, 2, 2), (1, 2, 0)).apply(w.reshape(4, 12))
    np.testing.assert_allclose(
        ours @ x.transpose(1, 2, 0).reshape(12), w.reshape(4, 12) @ x.reshape(12), atol=1e-5
    )
    rows = table.reorder_rows((3, 2, 2), (1, 2, 0)).apply(x.reshape(12))
    np.testing.assert_array_equal(rows, x.transpose(1, 2, 0).reshape(12))


def test_rotary_rows_go_from_pairs_to_halves() -> None:
    pairs = mx.array([f for head in range(2) for i in range(3) for f in (10 * head + i, 10 * head + i + 5)])
    halves = [0, 1, 2, 5, 6, 7, 10, 11, 12, 15, 16, 17]
    assert table.rope_rows(2, 6).apply(pairs).tolist() == halves
    assert table.rope_rows(2, 6, 3).apply(mx.repeat(pairs[:, None], 3, 1))[:, 1].tolist() == halves


# ---- whole folders ----


def weights(folder: Path) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        out |= mx.load(str(file))
    return out


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
def test_a_folder_and_back(tmp_path: Path, dtype: mx.Dtype, optional: bool) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in", dtype, optional))
    out = run.convert(account.account(plan, OPTIONS), tmp_path / "out")
    stored = weights(out)
    toy_family.Toy().load_weights(list(stored.items()))  # strict
    model, autoencoder = toy_family.tensors(dtype, optional=True)
    foreign = model | {f"vae.{n}": v for n, v in autoencoder.items()}
    foreign.pop("position_ids")
    assert_same(table.restore(plan.entries, stored), foreign)
    assert_same(table.forward(plan.entries, foreign), stored)


def test_the_files_of_the_folder(tmp_path: Path) -> None:
    plan = toy_family.plan(toy_family.write(tmp_path / "in"), extra={"training": {"steps": 3}})
    done = account.account(plan, quantize.Options("4", 32))
    out = run.convert(done, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "model.safetensors.index.json", "notes.txt",
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "toy"
    assert config["training"] == {"steps": 3}
    assert config["quantization"] == config["quantization_config"] == {
        "group_size": 32, "bits": 4, "embed_tokens": {"group_size": 32, "bits": 6},
    }  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = weights(out)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"] == {
        "total_size": sum(v.nbytes for v in stored.values()),
        "total_parameters": sum(v.size for _, v in nn.utils.tree_flatten(toy_family.Toy().parameters())),
    }
    assert index["metadata"]["total_size"] == done.nbytes
    card = (out / "README.md").read_text()
    head = card.split("---")[1]
    assert 'base_model: "org/Toy"' in head
    assert 'license: "apache-2.0"' in head
    assert "https://example.org" in card
    assert "mlx-transfusion generate" not in card  # a part paints nothing by itself
    assert "4 bits in groups of 32; 1 matrix with a setting of its own" in card


def test_every_fault_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    model = toy_family.tensors()[0]
    model["model.0.weight"] = model["model.0.weight"].T
    model["odd.bias"] = model["odd.bias"].astype(mx.int32)
    model["unknown"] = model.pop("x.bias")
    mx.save_safetensors(str(tmp_path / "in" / "model.safetensors"), model)
    with pytest.raises(UserError) as caught:
        account.account(toy_family.plan(source), OPTIONS)
    assert str(caught.value).split("toy family: ")[1] == (
        "missing x.bias; unexpected unknown; model.0.weight has shape [64, 128], expected [128, 64]; "
        "odd.bias has dtype I32, expected a floating-point one"
    )


def test_a_table_that_does_not_fit_its_model_is_told(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    entries = [e for e in toy_family.entries() if e.target != "odd.bias"]
    entries.append(table.unused("odd.bias", (8,), "a mistake"))
    entries.append(table.vector("x.bias", "nowhere", toy_family.WIDTH))
    entries = [
        e if e.source != "vae.conv.weight" else table.Entry(e.source, e.target, e.shape) for e in entries
    ]
    with pytest.raises(UserError) as caught:
        account.account(toy_family.plan(source, entries=tuple(entries)), OPTIONS)
    assert str(caught.value).split("toy family: ")[1] == (
        "nothing gives the model's odd.bias; the model has no nowhere; "
        "picture.weight would have shape [8, 3, 5, 5], the model has [8, 5, 5, 3]"
    )


def test_many_faults_are_listed_by_their_pattern() -> None:
    faults = [f"missing layers.{i}.{name}.weight" for i in range(40) for name in ("up", "down")] + [
        "missing norm"
    ]
    assert account.shortened(faults) == [
        "missing layers.*.up.weight (40 of them)", "missing layers.*.down.weight (40 of them)", "missing norm",
    ]  # fmt: skip
    assert account.shortened(faults[:60]) == faults[:60]


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    model = toy_family.tensors()[0]
    model["head.weight"] = -model["head.weight"]
    mx.save_safetensors(str(tmp_path / "in" / "model.safetensors"), model)
    with pytest.raises(UserError, match=r"head\.weight differs from model\.embed\.weight"):
        run.convert(account.account(toy_family.plan(source), OPTIONS), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_one_name_in_two_files(tmp_path: Path) -> None:
    source = toy_family.write(tmp_path / "in")
    model = toy_family.tensors()[0] | {"vae.conv.bias": mx.zeros(8)}
    mx.save_safetensors(str(tmp_path / "in" / "model.safetensors"), model)
    with pytest.raises(UserError, match=r"ae\.safetensors: conv\.bias stands in .*model\.safetensors too"):
        account.account(toy_family.plan(source), OPTIONS)
