"""The U-Net patch encoder and decoder: alone, inside the model, and through training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from full_forward import full_forward, random_images, train_arrays
from mlx.utils import tree_flatten
from tiny_training import write_run

from mlx_transfusion import consistency, sequence
from mlx_transfusion.config import PRESETS, ModelConfig, preset
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import build, flat_parameters, load, save_model
from mlx_transfusion.models.patches import PatchDecoder, PatchEncoder, patchify
from mlx_transfusion.models.transfusion import Transfusion, _patch_tokens
from mlx_transfusion.models.unet import ResnetBlock, UNetDown, UNetUp, levels, pixel_norm
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.sequence import Image, Text
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.trainer import train

UNET: dict[str, Any] = {"patch_encoder": "unet", "unet_channels": 8, "unet_blocks": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"unet_blocks": 2, "patch_skip": True, "patch_positions": "learned", "qk_norm": True},
    "epsilon": {"patch_size": 2, "prediction": "epsilon"},
}
PREFIXES = [[1, 40, 41, 4], [1, 4], [1, 50, 4]]
IDS = mx.array([[*row, *[0] * (4 - len(row))] for row in PREFIXES])
LENGTHS = mx.array([len(row) for row in PREFIXES])
MakeModel = Callable[..., Transfusion]
Function = Callable[..., mx.array]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny_config: ModelConfig, make_model: MakeModel) -> Transfusion:
    return make_model(dataclasses.replace(tiny_config, **UNET | VARIANTS[request.param]), scale=0.12)


@pytest.fixture(scope="module")
def unet_model(tiny_config: ModelConfig, make_model: MakeModel) -> Transfusion:
    return make_model(dataclasses.replace(tiny_config, **UNET), scale=0.12)


def normal(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def relative(found: mx.array, wanted: mx.array) -> float:
    return float(np.linalg.norm(np.array(found - wanted)) / np.linalg.norm(np.array(wanted)))


def randomize(module: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """Give every weight a value that matters (fresh blocks are their shortcuts)."""
    flat = tree_flatten(module.parameters())
    module.load_weights(
        [(name, value + scale * normal(value.shape, seed + i)) for i, (name, value) in enumerate(flat)]
    )
    return module


# ---- the parts ----


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 8), (8, 24, 3)])
def test_shapes(tiny_config: ModelConfig, patch: int, height: int, width: int, channels: int) -> None:
    c = dataclasses.replace(
        tiny_config, image_height=height, image_width=width, image_channels=channels, patch_size=patch,
        image_mean=(0.0,) * channels, **UNET | {"unet_blocks": 2},
    )  # fmt: skip
    n = height * width // patch**2
    assert c.patches_per_image == n
    patches, angle = normal((2, n, c.patch_dim), 0), normal((2, c.hidden_size), 1)
    tokens, skips = PatchEncoder(c)(patches, angle)
    assert tokens.shape == (2, n, c.hidden_size)
    halvings = int(math.log2(patch))
    assert levels(c) == [8 * 2**i for i in range(halvings + 1)]
    wanted = [(2, height >> i, width >> i, 8 << i) for i in range(halvings + 1) for _ in range(2)]
    assert [s.shape for s in skips] == wanted  # the last level is the grid of patches
    assert PatchDecoder(c)(tokens, patches, angle, skips).shape == patches.shape


def test_rows_and_columns_stay_in_their_places(tiny_config: ModelConfig) -> None:
    """A change of one patch is largest in its own token or beside it, and so is that of one hidden state."""
    c = dataclasses.replace(tiny_config, image_height=16, image_width=32, **UNET)
    rows, columns, many = 4, 8, 16
    n = rows * columns
    mx.random.seed(0)
    encoder, decoder = PatchEncoder(c), PatchDecoder(c)
    decoder.unet.conv_out.weight = normal(decoder.unet.conv_out.weight.shape, 0)
    patches, angle = normal((many, n, c.patch_dim), 0), normal((many, c.hidden_size), 1)
    hidden, kick = normal((many, n, 32), 2), normal((many, n, c.patch_dim), 3)
    tokens, skips = encoder(patches, angle)
    out = decoder(hidden, patches, angle, skips)
    for k in range(n):
        here = (mx.arange(n) == k)[None, :, None]
        moved_tokens = encoder(mx.where(here, patches + kick, patches), angle)[0] - tokens
        moved_patches = decoder(mx.where(here, -hidden, hidden), patches, angle, skips) - out
        for moved in (moved_tokens, moved_patches):
            most = moved.square().sum((0, 2)).argmax().item()
            assert abs(most // columns - k // columns) <= 1
            assert abs(most % columns - k % columns) <= 1


def test_fresh_blocks_are_their_shortcuts_and_a_fresh_decoder_is_zero(tiny_config: ModelConfig) -> None:
    c = dataclasses.replace(tiny_config, **UNET, patch_skip=True)
    x, features = normal((2, 4, 4, 8), 0), normal((2, 6), 1)
    np.testing.assert_array_equal(ResnetBlock(8, 8, 6)(x, features), x)
    wider = ResnetBlock(8, 12, 6)
    np.testing.assert_array_equal(wider(x, features), wider.conv_shortcut(x))
    patches, angle = normal((2, 4, 48), 2), normal((2, 32), 3)
    tokens, skips = PatchEncoder(c)(patches, angle)
    assert tokens.std().item() > 0.3  # of the size of text's vectors
    assert mx.abs(PatchDecoder(c)(tokens, patches, angle, skips)).max().item() == 0


def test_gains_and_shifts_of_the_angle_cannot_grow() -> None:
    block = randomize(ResnetBlock(8, 8, 6))
    x, features = normal((2, 4, 4, 8), 0), normal((2, 6), 1)
    small = block(x, features)
    projection = block.time_emb_proj
    projection.weight, projection.bias = 1000 * projection.weight, 1000 * projection.bias
    np.testing.assert_allclose(block(x, features), small, rtol=1e-3, atol=1e-3)
    turned = block(x, -features)  # and yet the angle matters
    assert relative(turned, small) > 0.05
    assert mx.allclose(pixel_norm(x).square().mean(-1), mx.ones((2, 4, 4)), atol=1e-3).item()


def test_a_residual_block_is_that_of_torch() -> None:
    """Grouping of GroupNorm, layout of kernels and the order of things, in float64 PyTorch."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    block = randomize(ResnetBlock(16, 8, 6))
    w = {name: torch.tensor(np.array(value)).double() for name, value in tree_flatten(block.parameters())}
    x, features = normal((2, 4, 6, 16), 0), normal((2, 6), 1)

    def conv(name: str, x: Any, padding: int = 1) -> Any:
        kernel = w[f"{name}.weight"].permute(0, 3, 1, 2)
        return functional.conv2d(x, kernel, w[f"{name}.bias"], padding=padding)

    def group_norm(
        x: Any, groups: int
    ) -> Any:  # torch's own has no forward mode for what a convolution gives
        g = x.reshape(len(x), groups, -1)
        g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return g.reshape(x.shape)

    def pnorm(a: Any) -> Any:
        return (a / (a.pow(2).mean(1, keepdim=True) + 1e-5).sqrt())[:, :, None, None]

    def reference(x: Any, f: Any) -> Any:
        h = group_norm(x, 4) * w["norm1.weight"][:, None, None] + w["norm1.bias"][:, None, None]
        h = conv("conv1", functional.silu(h))
        gain, shift = functional.linear(f, w["time_emb_proj.weight"], w["time_emb_proj.bias"]).chunk(2, 1)
        h = group_norm(h, 2) * pnorm(gain) + pnorm(shift)
        return conv("conv2", functional.silu(h)) + conv("conv_shortcut", x, 0)

    theirs = [
        torch.tensor(np.array(v)).double() for v in (x, features, normal(x.shape, 2), normal((2, 6), 3))
    ]
    theirs[0], theirs[2] = (v.permute(0, 3, 1, 2) for v in (theirs[0], theirs[2]))
    value, tangent = torch.func.jvp(reference, tuple(theirs[:2]), tuple(theirs[2:]))
    (got,), (moved,) = mx.jvp(block, [x, features], [normal(x.shape, 2), normal((2, 6), 3)])
    np.testing.assert_allclose(got, value.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    np.testing.assert_allclose(moved, tangent.permute(0, 2, 3, 1).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("patch", [2, 8])
def test_each_block_up_reads_what_its_mirror_down_gave(tiny_config: ModelConfig, patch: int) -> None:
    """The last block down meets the first one up, and so on to the first down and the last up."""
    c = dataclasses.replace(
        tiny_config, image_height=16, image_width=16, patch_size=patch, **UNET | {"unet_blocks": 2}
    )
    down, up = randomize(UNetDown(c)), randomize(UNetUp(c), seed=50)
    images, angle = normal((2, 16, 16, 3), 0), normal((2, c.hidden_size), 1)
    hidden, skips = normal((2, c.patches_per_image, c.hidden_size), 2), down(images, angle)[1]
    assert len(skips) == 2 * (math.log2(patch) + 1)

    features = nn.silu(up.time_proj(nn.silu(angle)))
    x = up.proj_in(hidden).reshape(2, 16 // patch, 16 // patch, -1)
    unread = list(skips)
    for level in up.up_blocks:
        for block in level.resnets:
            x = block(mx.concatenate([x, unread.pop()], -1), features)
        if "upsample" in level:
            x = level.upsample(mx.repeat(mx.repeat(x, 2, 1), 2, 2))
    expected = up.conv_out(nn.silu(up.conv_norm_out(x)))
    out = up(hidden, angle, skips)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for i in range(len(skips)):
        without = tuple(mx.zeros_like(s) if k == i else s for k, s in enumerate(skips))
        assert relative(up(hidden, angle, without), out) > 1e-4, f"skip {i} is read"


def parts(c: ModelConfig) -> dict[str, tuple[Function, list[mx.array]]]:
    """Every part as a function of arrays alone, with the arrays."""
    down, up = randomize(UNetDown(c)), randomize(UNetUp(c), seed=50)
    images, angle = normal((2, c.image_height, c.image_width, 3), 0), normal((2, c.hidden_size), 1)
    hidden, skips = normal((2, c.patches_per_image, c.hidden_size), 2), down(images, angle)[1]
    return {
        "block": (randomize(ResnetBlock(8, 16, 32)), [normal((2, 4, 4, 8), 3), angle]),
        "tokens": (lambda x, a: down(x, a)[0], [images, angle]),
        "skip": (lambda x, a: down(x, a)[1][-1], [images, angle]),
        "up": (lambda h, a, *s: up(h, a, s), [hidden, angle, *skips]),
        "down and up": (lambda x, a, h: up(h, a, down(x, a)[1]), [images, angle, hidden]),
    }


@pytest.mark.parametrize(
    ("part", "patch"),
    [("block", 4), ("tokens", 4), ("skip", 4), ("up", 4), *(("down and up", patch) for patch in (2, 4, 8))],
)
def test_derivatives_of_the_parts_equal_central_differences(
    tiny_config: ModelConfig, part: str, patch: int
) -> None:
    f, at = parts(dataclasses.replace(tiny_config, patch_size=patch, **UNET))[part]
    along = [normal(a.shape, 20 + i) for i, a in enumerate(at)]
    (value,), (tangent,) = mx.jvp(f, at, along)
    np.testing.assert_allclose(value, f(*at), atol=1e-5)
    h = 3e-3
    ahead, behind = (f(*(a + s * d for a, d in zip(at, along, strict=True))) for s in (h, -h))
    assert relative(tangent, (ahead - behind) / (2 * h)) < 2e-3


# ---- in the model ----


def network_of(model: Transfusion) -> Function:
    _, prefix = model.read_prefix(IDS)
    return lambda x, angle: model.paint(x, angle, prefix, LENGTHS)


def states(model: Transfusion) -> tuple[mx.array, mx.array, mx.array]:
    """Noisy pictures x [3, N, P], angles [3] and velocities [3, N, P]."""
    x, angle = random_images(model, 3)
    return mx.array(x), mx.array(angle), mx.array(random_images(model, 3, seed=1)[0])


def test_derivative_along_the_trajectory_equals_central_differences(model: Transfusion) -> None:
    """x(a +- h) = cos(h) x +- sin(h) v; the skips of the U-Net move along with everything else."""
    x, angle, v = states(model)
    network, h = network_of(model), 5e-3
    value = consistency.value_and_derivative(network, x, angle, mx.cos(angle)[:, None, None] * v)
    found = value.derivative / (mx.cos(angle) * mx.sin(angle))[:, None, None]
    ahead, behind = (network(math.cos(s) * x + math.sin(s) * v, angle + s) for s in (h, -h))
    assert relative(found, (ahead - behind) / (2 * h)) < 1e-3


def test_gradient_checkpointing_changes_no_gradient_of_the_consistency_loss(model: Transfusion) -> None:
    x, angle, v = states(model)
    weights = model.parameters()

    def loss(w: dict) -> mx.array:
        model.update(w)
        value = consistency.value_and_derivative(
            network_of(model), x, angle, mx.cos(angle)[:, None, None] * v
        )
        g = consistency.rescale(consistency.tangent(value, x, angle, mx.cos(angle)[:, None, None] * v))
        return consistency.image_losses(value.network, g, mx.zeros_like(angle)).sum()

    def gradients(on: bool) -> dict[str, mx.array]:
        model.gradient_checkpointing = on
        try:
            return dict(tree_flatten(mx.grad(loss)(weights)))
        finally:
            model.update(weights)
            model.gradient_checkpointing = False

    plain, again = gradients(False), gradients(True)
    # the target is a constant, so the gradient is that of a plain second pass towards it
    value = consistency.value_and_derivative(network_of(model), x, angle, mx.cos(angle)[:, None, None] * v)
    g = consistency.rescale(consistency.tangent(value, x, angle, mx.cos(angle)[:, None, None] * v))

    def second_pass(w: dict) -> mx.array:
        model.update(w)
        return (network_of(model)(x, angle) - mx.stop_gradient(value.network) - g).square().mean((1, 2)).sum()

    wanted = dict(tree_flatten(mx.grad(second_pass)(weights)))
    model.update(weights)
    for name, gradient in plain.items():
        if name.startswith("patch_"):
            assert mx.abs(gradient).max().item() > 0, name
        np.testing.assert_allclose(again[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_cached_generation_equals_the_packed_forward(model: Transfusion) -> None:
    """Text, clean picture, text, noisy picture: `velocity` and `extend_image` against one pass over all of it."""
    c = model.config
    n = c.patches_per_image
    patches, angle = random_images(model, 2)
    angle[0] = 0
    _, cache = model.prefill(np.array([[1, 40, 41, 4]]), np.array([4]))
    model.extend_image(mx.array(patches[:1]), cache)
    after = model.extend_text(np.array([[5, 60, 4]]), np.array([3]), cache)
    velocity = model.velocity(mx.array(patches[1:]), mx.array(angle[1:]), cache)
    story = [Text((1, 40, 41, 4)), Image(0, n), Text((5, 60, 4)), Image(1, n), Text((5, 2))]
    logits, prediction, _ = full_forward(model, [story], sequence.length(story), patches, angle)
    np.testing.assert_allclose(after[0], logits[0, 4 + n + 2], atol=1e-4)
    if c.prediction == "epsilon":
        prediction = (prediction - np.sin(angle[1]) * patches) / np.cos(angle[1])
    np.testing.assert_allclose(velocity[0], prediction[1], rtol=1e-3, atol=1e-4)


def test_pictures_of_a_batch_do_not_touch_each_other(unet_model: Transfusion) -> None:
    """In packed rows too: what normalises a picture is the picture alone."""
    n = unet_model.config.patches_per_image
    documents = [[Text((1, 40, 4)), Image(0, n), Text((5,))], [Text((1, 4)), Image(1, n), Text((5,))]]
    patches, angle = random_images(unet_model, 2)
    _, prediction, packed = full_forward(unet_model, documents, 16, patches, angle)
    other = patches.copy()
    other[0] += 1
    _, moved = unet_model(train_arrays(packed, other, angle))
    np.testing.assert_array_equal(moved[1], prediction[1])
    assert mx.abs(moved[0] - prediction[0]).max().item() > 1e-3


def test_half_precision_weights_give_a_half_precision_decoder(
    tiny_config: ModelConfig, make_model: MakeModel
) -> None:
    model = make_model(dataclasses.replace(tiny_config, **UNET), scale=0.12)
    patches, angle = map(mx.array, random_images(model, 3))
    exact = network_of(model)(patches, angle)
    model.set_dtype(mx.bfloat16)
    tokens, _ = _patch_tokens(model, patches, model.angle_embedding(angle), model.config.grid())
    assert tokens.dtype == mx.bfloat16
    assert relative(network_of(model)(patches, angle).astype(mx.float32), exact) < 0.1


# ---- files, sizes, bad input ----


def test_saved_and_loaded(unet_model: Transfusion, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = load(save_model(tmp_path / "unet", unet_model, tiny_tokenizer))
    assert loaded.config == unet_model.config
    ours, theirs = flat_parameters(unet_model), flat_parameters(loaded.model)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    x, angle, _ = states(unet_model)
    np.testing.assert_array_equal(network_of(loaded.model)(x, angle), network_of(unet_model)(x, angle))


def test_a_state_dict_of_our_own_names_converts(
    unet_model: Transfusion, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    try:
        from mlx_transfusion.convert.state_dict import convert_state
    except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
        from convert.state_dict import convert_state
    mx.save_safetensors(str(tmp_path / "state.safetensors"), flat_parameters(unet_model))
    (tmp_path / "config.json").write_text(json.dumps(unet_model.config.to_dict()))
    tiny_tokenizer.save(tmp_path)
    where = (tmp_path / name for name in ("state.safetensors", "config.json", "tokenizer.model", "out"))
    converted = flat_parameters(load(convert_state(*where)).model)
    for name, value in flat_parameters(unet_model).items():
        assert np.array_equal(converted[name], value), name


def test_models_without_a_unet_are_what_they_were(tiny_config: ModelConfig) -> None:
    old = {
        name: value
        for name, value in tiny_config.to_dict().items()
        if not name.startswith(("unet_", "patch_e"))
    }
    assert ModelConfig.from_dict(old) == tiny_config
    names = {name for name in flat_parameters(build(tiny_config)) if name.startswith("patch_")}
    assert names == {
        f"patch_{part}.proj.{kind}" for part in ("encoder", "decoder") for kind in ("weight", "bias")
    }


def test_the_papers_unet_has_its_size() -> None:
    """0.27 billion more at 7B (section 3.3), and hardly less at other widths."""
    extra = {
        name: (parameter_count(build(preset(f"{name}-unet"))) - parameter_count(build(preset(name)))) / 1e9
        for name in PRESETS
    }
    assert round(extra["7b"], 2) == 0.27
    assert all(0.24 < extra[name] < 0.27 for name in ("0.16b", "0.37b", "0.76b", "1.4b"))
    coarse = {4: 320, 8: 160}  # fewer tokens a picture at about the same size
    for patch, channels in coarse.items():
        c = dataclasses.replace(preset("7b-unet"), patch_size=patch, unet_channels=channels)
        unet = sum(parameter_count(build(c)[part]) for part in ("patch_encoder", "patch_decoder"))
        assert 0.23e9 < unet < 0.27e9
        assert c.patches_per_image == (32 // patch) ** 2
    with pytest.raises(UserError, match='preset "9b-unet" is unknown'):
        preset("9b-unet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_encoder": "conv"}, 'patch_encoder is "conv", expected one of linear, unet'),
        (
            {"patch_encoder": "unet", "patch_size": 3, "image_height": 9, "image_width": 9},
            "patch_size 3 must be a power",
        ),
        ({"patch_encoder": "unet", "unet_channels": 6}, "unet_channels is 6, expected a multiple of 4"),
        ({"unet_channels": 0}, "unet_channels is 0, expected a positive number"),
        ({"unet_blocks": -1}, "unet_blocks is -1, expected a positive number"),
    ],
)
def test_impossible_unets_are_refused_in_one_line(
    tiny_config: ModelConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        dataclasses.replace(tiny_config, **changes)
    assert "\n" not in str(error.value)


# ---- training ----


def test_train_and_distill(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    toml = write_run(tmp_path, tiny_tokenizer)
    unet = [
        'model.patch_encoder="unet"',
        "model.unet_channels=8",
        "model.unet_blocks=1",
        'optimizer.name="muon"',
    ]
    first = train(
        load_train_config(toml, [*unet, f"output={tmp_path / 'teachers'}", "steps=3", "compile=false"])
    )
    teacher = load(first)
    assert teacher.config.patch_encoder == "unet"
    fresh = dict(tree_flatten(Transfusion(teacher.config).parameters()))
    trained = flat_parameters(teacher.model)
    assert mx.abs(trained["patch_decoder.unet.conv_out.weight"]).max().item() > 0  # it started at zero
    assert trained.keys() == fresh.keys()

    text = toml.read_text()
    head, data = text[: text.index("[model]")], text[text.index("[[data.train]]") :]
    (tmp_path / "distill.toml").write_text(
        f'{head}[consistency]\nteacher = "{first}"\nguidance = 2.0\n\n{data}'
    )
    last = train(load_train_config(tmp_path / "distill.toml", [f"output={tmp_path / 'students'}", "steps=3"]))
    student = load(last)
    assert student.config.patch_encoder == "unet"
    assert student.extra["objective"]["name"] == "consistency"
    moved = flat_parameters(student.model)
    for name in (
        "patch_encoder.unet.conv_in.weight",
        "patch_decoder.unet.up_blocks.0.resnets.0.conv1.weight",
    ):
        assert mx.isfinite(moved[name]).all().item()
        assert mx.abs(moved[name] - trained[name]).max().item() > 0, name
    image = patchify(student.model.decode(mx.zeros((1, 4, 48))), 4)
    assert image.shape == (1, 4, 48)
