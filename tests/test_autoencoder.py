"""The KL autoencoder equals diffusers': stored numbers of three layouts, and live on any small config."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from autoencoder_tools import FIXTURES, NAMES, converter, foreign_config, golden, model, table, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_transfusion import noise
from mlx_transfusion.autoencoder.folder import load_autoencoder
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL, Moments
from mlx_transfusion.models.gates import silu

TOLERANCE = 1e-4


def close(name: str, key: str, found: mx.array) -> None:
    expected = golden(name)[key]
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max().item() < TOLERANCE, key


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_the_official_one(name: str) -> None:
    io, autoencoder = golden(name), model(name)
    moments = autoencoder.encode(io["image"])
    close(name, "encode.mean", moments.mean)
    close(name, "encode.logvar", moments.logvar)
    close(name, "encode.sample", moments.sample(io["encode.eps"]))
    close(name, "encode.scaled_latent", autoencoder.normalize(moments.mean))
    close(name, "reconstruct.mode", autoencoder.decode(moments.mean))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_official_one(name: str) -> None:
    io, autoencoder = golden(name), model(name)
    close(name, "decode.image", autoencoder.decode(io["decode.latent"]))
    raw = autoencoder.denormalize(io["decode.scaled_latent_in"])
    close(name, "decode.unscaled_image", autoencoder.decode(raw))


@pytest.mark.parametrize("name", NAMES)
def test_every_block_gives_the_official_numbers(name: str) -> None:
    io, autoencoder = golden(name), model(name)
    seen = walk_encoder(autoencoder, io["image"]) | walk_decoder(autoencoder, io["decode.latent"])
    expected = {key for key in io if key.startswith(("encoder.", "decoder."))}
    assert len(expected) > 8
    assert expected <= seen.keys()
    for key in expected:
        close(name, key, seen[key])


def walk_encoder(autoencoder: AutoencoderKL, x: mx.array) -> dict[str, mx.array]:
    part, out = autoencoder.encoder, {}
    x = part.conv_in(x)
    for i, block in enumerate(part.down_blocks):
        x = out[f"encoder.down_blocks.{i}"] = block(x)
    first = out["encoder.mid_block.resnets.0"] = part.mid_block.resnets[0](x)
    out["encoder.mid_block.attentions.0"] = part.mid_block.attentions[0](first)
    x = out["encoder.mid_block"] = part.mid_block(x)
    x = out["encoder.conv_norm_out"] = part.conv_norm_out(x)
    out["encoder.conv_out"] = part.conv_out(silu(x))
    return out


def walk_decoder(autoencoder: AutoencoderKL, z: mx.array) -> dict[str, mx.array]:
    part, out = autoencoder.decoder, {}
    if autoencoder.config.use_post_quant_conv:
        z = out["decoder.post_quant_conv"] = autoencoder.post_quant_conv(z)
    x = out["decoder.conv_in"] = part.conv_in(z)
    x = out["decoder.mid_block"] = part.mid_block(x)
    for i, block in enumerate(part.up_blocks):
        x = out[f"decoder.up_blocks.{i}"] = block(x)
    return out


def test_the_scale_goes_there_and_back() -> None:
    z = mx.random.normal((2, 3, 5, 16), key=mx.random.key(0))
    flux = model("kl-flux")
    assert mx.allclose(flux.normalize(z), (z - 0.1159) * 0.3611)
    assert mx.allclose(flux.denormalize(flux.normalize(z)), z, atol=1e-5)
    config = AutoencoderConfig(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
        latents_mean=(1.0, -2.0), latents_std=(2.0, 4.0),
    )  # fmt: skip
    per_channel = AutoencoderKL(config)
    z = mx.array([[[[3.0, 2.0]]]])
    assert per_channel.normalize(z).tolist() == [[[[0.5, 0.5]]]]
    assert per_channel.denormalize(per_channel.normalize(z)).tolist() == z.tolist()


def test_a_seed_names_the_sample() -> None:
    moments = model("kl-8ch").encode(golden("kl-8ch")["image"])
    eps = [mx.array(noise.normal(seed, 3, moments.mean.shape, "latents")) for seed in (7, 7, 8)]
    first, again, other = (moments.sample(e) for e in eps)
    assert mx.array_equal(first, again)
    assert not mx.allclose(first, other)


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    mean, std = 0.7, 1.9
    shape = (2, 1, 2, 3)
    found = Moments(mx.full(shape, mean), mx.full(shape, 2 * np.log(std))).kl()
    one = 0.5 * (mean**2 + std**2 - 1) - np.log(std)
    np.testing.assert_allclose(np.array(found), [6 * one] * 2, rtol=1e-5)


def test_variances_are_bounded() -> None:
    config = AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    autoencoder = AutoencoderKL(config)
    autoencoder.quant_conv.weight = mx.zeros_like(autoencoder.quant_conv.weight)
    for bias, expected in ((99.0, 20.0), (-99.0, -30.0)):
        autoencoder.quant_conv.bias = mx.array([0.0, bias])
        assert (autoencoder.encode(mx.zeros((1, 4, 4, 3))).logvar == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_converting_back_gives_the_same_bits(name: str) -> None:
    entries = converter.entries(model(name).config)
    assert {e.source: e.shape for e in entries} == {n: tuple(v.shape) for n, v in weights(name).items()}
    back = table.restore(entries, table.forward(entries, weights(name)))
    assert all(mx.array_equal(back[n], value) for n, value in weights(name).items())


def test_the_original_code_spells_the_same_graph() -> None:
    """FLUX's own names and a first convolution of its own width: the file that BAGEL comes with."""
    folder = FIXTURES / "bagel"
    config = AutoencoderConfig(
        block_out_channels=(64, 32, 32), stem_channels=32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    state = mx.load(str(folder / "ae.safetensors"))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    entries = converter.entries(config, *converter.spelling_of(shapes, shapes))
    assert {e.source: e.shape for e in entries} == shapes
    ours = AutoencoderKL(config)
    ours.load_weights(list(table.forward(entries, state).items()), strict=True)
    io = {
        k: v.transpose(0, 2, 3, 1)
        for k, v in mx.load(str(folder / "io.safetensors")).items()
        if k.startswith("ae.")
    }
    moments = ours.encode(io["ae.pixels"])
    latent = ours.normalize(moments.sample(io["ae.posterior_noise"]))
    assert mx.abs(latent - io["ae.latent"]).max().item() < TOLERANCE
    assert mx.abs(ours.decode(ours.denormalize(latent)) - io["ae.decoded"]).max().item() < TOLERANCE


@pytest.mark.parametrize(
    ("channels", "quant", "parameters"),
    [(4, True, 83_653_863), (16, False, 83_819_683), (8, True, 83_709_419)],
)
def test_the_public_layouts_have_their_size(channels: int, quant: bool, parameters: int) -> None:
    """Counted by diffusers: Stable Diffusion and SDXL, FLUX, and the paper's 8 channels."""
    config = AutoencoderConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
        use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
    assert sum(math.prod(e.shape) for e in converter.entries(config)) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_converted_by_the_verb(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(FIXTURES / name), "--output", str(tmp_path / "ours")])
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "ours"))
    loaded = load_autoencoder(tmp_path / "ours")
    assert loaded.config == model(name).config
    assert mx.array_equal(
        loaded.model.decode(golden(name)["decode.latent"]), model(name).decode(golden(name)["decode.latent"])
    )


@pytest.mark.parametrize("flat", [True, False])
def test_names_of_old_diffusers(flat: bool) -> None:
    new = converter.entries(model("kl-sd").config)
    old = converter.entries(model("kl-sd").config, "old", flat)
    renamed = {
        o.source: (n.source, o.shape)
        for n, o in zip(new, old, strict=True)
        if (n.source, n.shape) != (o.source, o.shape)
    }
    at = "encoder.mid_block.attentions.0"
    assert renamed[f"{at}.query.weight"] == (f"{at}.to_q.weight", (32, 32) if flat else (32, 32, 1, 1))
    assert renamed[f"{at}.proj_attn.bias"] == (f"{at}.to_out.0.bias", (32,))
    assert len(renamed) == 16
    state = table.restore(old, dict(tree_flatten(model("kl-sd").parameters())))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert converter.spelling_of(shapes, shapes) == ("old", flat)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4),
    layers=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 5),
    attends=st.booleans(),
    quant=st.tuples(st.booleans(), st.booleans()),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_it_is_the_graph_of_diffusers(
    widths: list[int], layers: int, groups: int, channels: int, attends: bool,
    quant: tuple[bool, bool], size: tuple[int, int], seed: int,
) -> None:  # fmt: skip
    torch = pytest.importorskip("torch", reason="compares with PyTorch's diffusers")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    torch.manual_seed(seed)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths), layers_per_block=layers, latent_channels=channels, norm_num_groups=groups,
        use_quant_conv=quant[0], use_post_quant_conv=quant[1], mid_block_add_attention=attends,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = AutoencoderConfig.from_diffusers(dict(theirs.config))
    state = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    ours = AutoencoderKL(config)
    ours.load_weights(list(table.forward(converter.entries(config), state).items()), strict=True)
    shape = (2, config.factor * size[0], config.factor * size[1])
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (*shape, 3)).astype(np.float32)
    z = rng.normal(size=(2, *size, channels)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        decoded = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    moments = ours.encode(mx.array(pixels))
    for found, expected in (
        (moments.mean, posterior.mean),
        (moments.logvar, posterior.logvar),
        (ours.decode(mx.array(z)), decoded),
    ):
        reference = expected.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(
            np.array(found), reference, atol=TOLERANCE * max(1, np.abs(reference).max())
        )


# ---- bad input ----


def test_a_size_that_the_halvings_do_not_divide() -> None:
    with pytest.raises(UserError, match="20x16 pixels: this autoencoder takes multiples of 8"):
        model("kl-8ch").encode(mx.zeros((1, 16, 20, 3)))


def test_pictures_of_other_channels() -> None:
    with pytest.raises(UserError, match=r"this autoencoder takes \[B, H, W, 3\]"):
        model("kl-8ch").encode(mx.zeros((1, 16, 16, 1)))


def test_latents_of_another_autoencoder() -> None:
    with pytest.raises(
        UserError, match=r"takes \[B, h, w, 8\]: use the autoencoder that they were made with"
    ):
        model("kl-8ch").decode(mx.zeros((1, 4, 4, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn is 'relu', and only"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', and only"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownBlock2D"]}, "only \"DownEncoderBlock2D\""),
        ({"norm_num_groups": 7}, "expected multiples of norm_num_groups"),
        ({"scaling_factor": 0}, "scaling_factor is 0.0, expected a positive number"),
        ({"latent_channels": "4"}, "latent_channels: expected int"),
        ({"latents_mean": [0.0]}, "stand together or not at all"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, "expected one for each of the 4"),
        ({"tiles": 1}, 'unknown key "tiles"'),
    ],
)  # fmt: skip
def test_a_config_that_the_graph_does_not_have(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        AutoencoderConfig.from_diffusers(foreign_config("kl-sd") | change)


def test_our_own_config_is_read_back(tmp_path: Path) -> None:
    for name in NAMES:
        config = model(name).config
        assert AutoencoderConfig.from_dict(config.to_dict()) == config
