"""The codebook against PyTorch and the published formulas; training with one, exact resume, its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from autoencoder_tools import randomize
from mlx.utils import tree_flatten
from PIL import Image
from test_autoencoder_training import arrays, write_run

from mlx_transfusion import noise
from mlx_transfusion.autoencoder.bottleneck import codebook_from, quantized_start
from mlx_transfusion.autoencoder.config import load_training
from mlx_transfusion.autoencoder.folder import load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.latents import encode_to_codes
from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.autoencoder.trainer import Trainer, train
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_config import QuantizerConfig
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.models.quantizer import (
    EPS,
    Usage,
    VectorQuantizer,
    even_usage,
    revive,
    update_usage,
)
from mlx_transfusion.training.image_store import ImageRef, open_images
from mlx_transfusion.training.latents import CODES, LatentCache

VQ = ["model.quantizer.codes=16", "loss.gan_start=1000"]
SIZES = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3, "sample_size": 8}


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Elements [2, 3, 5, 4] and a codebook [7, 4]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 3, 5, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)


def with_codebook(codebook: np.ndarray) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codebook.shape)
    quantizer.codebook = mx.array(codebook)
    return quantizer


def test_values_losses_and_gradients_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="the reference is written in PyTorch")
    z, codebook = draw()
    pull = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)

    tz, te = torch.tensor(z, requires_grad=True), torch.tensor(codebook, requires_grad=True)
    indices = torch.cdist(tz.reshape(-1, 4), te).argmin(1)
    nearest = te[indices].reshape(tz.shape)
    codebook_loss = torch.nn.functional.mse_loss(nearest, tz.detach())
    commitment = torch.nn.functional.mse_loss(tz, nearest.detach())
    values = tz + (nearest - tz).detach()
    ((values * torch.tensor(pull)).sum() + codebook_loss + 0.25 * commitment).backward()

    def loss(z: mx.array, e: mx.array) -> tuple[mx.array, mx.array]:
        quantizer.codebook = e
        q = quantizer(z)
        return (q.values * mx.array(pull)).sum() + q.codebook_loss + 0.25 * q.commitment, q

    quantizer = with_codebook(codebook)
    (_, q), (dz, de) = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(z), mx.array(codebook))
    np.testing.assert_array_equal(q.codes.reshape(-1), indices.numpy())
    np.testing.assert_allclose(q.values, values.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(q.codebook_loss, codebook_loss.item(), rtol=1e-6)
    np.testing.assert_allclose(q.commitment, commitment.item(), rtol=1e-6)
    np.testing.assert_allclose(dz, tz.grad.numpy(), atol=1e-6)
    np.testing.assert_allclose(de, te.grad.numpy(), atol=1e-6)


def test_running_means_are_those_of_the_paper() -> None:
    z, codebook = draw()
    flat, quantizer = z.reshape(-1, 4), with_codebook(codebook)
    usage = even_usage(mx.array(codebook), len(flat))
    n, m = np.full(7, len(flat) / 7), codebook * len(flat) / 7
    np.testing.assert_allclose(usage.means, codebook, rtol=1e-5)
    for _ in range(3):
        codes = quantizer.codes(mx.array(flat))
        usage = update_usage(usage, mx.array(flat), codes, 0.9)
        for k in range(7):
            members = flat[np.array(codes) == k]
            n[k] = 0.9 * n[k] + 0.1 * len(members)
            m[k] = 0.9 * m[k] + 0.1 * members.sum(0)
        quantizer.codebook = usage.means
        smoothed = (n + EPS) / (n.sum() + 7 * EPS) * n.sum()
        np.testing.assert_allclose(usage.counts, n, rtol=1e-5)
        np.testing.assert_allclose(quantizer.codebook, m / smoothed[:, None], rtol=1e-4, atol=1e-6)


def test_perplexity_is_the_number_of_codes_in_use() -> None:
    sums = mx.zeros((4, 2))
    assert Usage(mx.array([3.0, 3.0, 3.0, 3.0]), sums).perplexity.item() == pytest.approx(4)
    assert Usage(mx.array([5.0, 5.0, 0.0, 0.0]), sums).perplexity.item() == pytest.approx(2)
    assert Usage(mx.array([9.0, 0.0, 0.0, 0.0]), sums).perplexity.item() == pytest.approx(1)


def test_dead_codes_move_to_elements_and_live_ones_stay() -> None:
    z = mx.arange(20.0).reshape(10, 2)
    codebook = -mx.ones((5, 2))
    usage = Usage(mx.array([4.0, 0.001, 3.0, 0.0, 3.0]), mx.ones((5, 2)))
    chosen = mx.array([0, 1, 2, 3, 4])
    new, now, dead = revive(codebook, usage, z, chosen, 0.02)
    assert dead.tolist() == [False, True, False, True, False]
    assert new.tolist() == [[-1, -1], [2, 3], [-1, -1], [6, 7], [-1, -1]]
    assert now.counts.tolist() == [4, 2, 3, 2, 3]  # an even use of 10 elements by 5 codes is 2
    assert now.sums[1].tolist() == [4, 6]
    same, _, none = revive(codebook, usage, z, chosen, 0.0)
    assert not none.any().item()
    assert mx.array_equal(same, codebook)


@pytest.mark.parametrize("ema", ["true", "false"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, ema: str) -> None:
    toml = write_run(tmp_path)
    settings = [
        *VQ,
        f"codebook.ema={ema}",
        "codebook.revive_below=0.9",
        "codebook.decay=0.5",
        "loss.gan_start=4",
    ]
    whole = train(load_training(toml, settings))
    halfway = tmp_path / "run" / "checkpoints" / "step-00000003"
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    shutil.copytree(halfway, other / halfway.name)
    again = train(load_training(toml, [*settings, f"output={tmp_path / 'other'}"]))
    a, b = arrays(whole), arrays(again)
    assert {"train/usage.counts", "train/usage.sums", "model/quantizer.codebook"} < a.keys()
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"perplexity"' in lines
    assert any(json.loads(line)["revived"] > 0 for line in lines.splitlines())


@pytest.mark.parametrize("ema", ["true", "false"])
def test_the_loss_of_a_run(tmp_path: Path, ema: str) -> None:
    """L1 + 1 codebook + 0.25 commitment; running means have no codebook loss."""
    trainer = Trainer(load_training(write_run(tmp_path), [*VQ, f"codebook.ema={ema}"]))
    pixels, weights = mx.array(to_signed(trainer.train.batch(0, 4))), trainer.state.weights["autoencoder"]
    total, (terms, *_) = trainer.step._loss(weights, pixels, mx.zeros((16,), mx.int32), None)
    weight = {"l1": 1, "codebook": 0 if ema == "true" else 1, "commitment": 0.25}
    assert all(terms[name].item() > 0 for name in weight)
    assert total.item() == pytest.approx(sum(w * terms[name].item() for name, w in weight.items()), rel=1e-5)


@pytest.mark.parametrize("ema", ["true", "false"])
def test_training_learns_pictures_and_codes(tmp_path: Path, ema: str) -> None:
    toml = write_run(tmp_path)
    trainer = Trainer(load_training(toml, [*VQ, "steps=40", f"codebook.ema={ema}", "data.flip=0"]))
    before = mx.array(trainer.model.quantizer.codebook)
    values = [trainer._train_step(trainer.train.batch(n, 4)) for n in range(40)]
    assert np.mean([v["l1"] for v in values[-5:]]) < 0.85 * np.mean([v["l1"] for v in values[:5]])
    assert values[-1]["perplexity"] > 2
    moved = mx.abs(trainer.state.weights["autoencoder"]["quantizer"]["codebook"] - before).max().item()
    assert moved > 1e-3
    assert "commitment" in values[0]
    assert "kl" not in values[0]


def test_running_means_leave_the_optimiser_nothing_to_do(tmp_path: Path) -> None:
    toml = write_run(tmp_path)
    trainer = Trainer(load_training(toml, [*VQ, "codebook.ema=true", "optimizer.weight_decay=0.5"]))
    for n in range(2):
        trainer._train_step(trainer.train.batch(n, 4))
    weights = trainer.state.weights
    expected = Usage(**weights["usage"]).means
    np.testing.assert_allclose(weights["autoencoder"]["quantizer"]["codebook"], expected, rtol=1e-5)


def kl_model(**changes: object) -> AutoencoderKL:
    model = AutoencoderKL(AutoencoderConfig.from_dict(SIZES | changes))
    randomize(model)
    return model


def vq_model(codes: int = 16, **changes: object) -> AutoencoderVQ:
    model = AutoencoderVQ(AutoencoderConfig.from_dict(SIZES | {"quantizer": {"codes": codes}} | changes))
    randomize(model, 1)
    return model


@pytest.mark.parametrize("convolution", [True, False])
def test_a_start_from_kl_has_its_means(convolution: bool) -> None:
    theirs = kl_model(use_quant_conv=convolution)
    ours = vq_model(use_quant_conv=convolution)
    codebook = mx.array(ours.quantizer.codebook)
    quantized_start(ours, theirs)
    pixels = mx.random.uniform(-1, 1, (2, 8, 8, 3), key=mx.random.key(0))
    np.testing.assert_allclose(ours.encoded(pixels), theirs.encode(pixels).mean, atol=1e-5)
    z = mx.random.normal((1, 4, 4, 3), key=mx.random.key(1))
    np.testing.assert_array_equal(ours.decode(z), theirs.decode(z))
    assert mx.array_equal(ours.quantizer.codebook, codebook)
    assert dict(tree_flatten(ours.parameters()))["encoder.conv_out.weight"].shape[0] == 3


def test_a_run_starts_from_kl(tmp_path: Path) -> None:
    toml = write_run(tmp_path)
    save_autoencoder(tmp_path / "kl", kl_model())
    trainer = Trainer(load_training(toml, [*VQ, f"init={tmp_path / 'kl'}"]))
    pixels = mx.array(to_signed(next(trainer.train.first(12))))
    means = np.array(kl_model().encode(pixels).mean).reshape(-1, 3)
    np.testing.assert_allclose(trainer.model.quantizer.codebook, codebook_from(means, 16, 0), atol=1e-3)
    save_autoencoder(tmp_path / "vq", vq_model())
    with pytest.raises(UserError, match=r"its quantizer is {'codes': 16}, \[model\] says {'codes': 8}"):
        Trainer(load_training(toml, ["model.quantizer.codes=8", f"init={tmp_path / 'vq'}"]))
    with pytest.raises(UserError, match=r"its quantizer is {'codes': 16}, \[model\] says None"):
        Trainer(load_training(toml, [f"init={tmp_path / 'vq'}"]))


def test_few_elements_fill_a_large_codebook() -> None:
    elements = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    found = np.array(codebook_from(elements, 7, 0))
    assert {tuple(row) for row in found} == {tuple(row) for row in elements}


def test_a_codebook_begins_where_elements_are() -> None:
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(4, 3, dtype=np.float32)
    elements = (centres[rng.integers(0, 4, 400)] + rng.normal(0, 0.1, (400, 3))).astype(np.float32)
    found = np.array(codebook_from(elements, 8, 0))
    error = np.square(elements[:, None] - found).sum(-1).min(1).mean()
    start = elements[np.resize(noise.permutation(0, 0, 400, "autoencoder/codebook"), 8)]
    assert error < 0.8 * np.square(elements[:, None] - start).sum(-1).min(1).mean()


def test_codes_and_back(tmp_path: Path) -> None:
    loaded = load_autoencoder(save_autoencoder(tmp_path / "vq", vq_model()))
    assert loaded.config.quantizer == QuantizerConfig(16)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    codes = loaded.encode_codes(pixels.astype(np.float32) / 255)
    assert (codes.shape, codes.dtype) == ((2, 4, 4), mx.int32)
    z = loaded.model.encoded(mx.array(to_signed(pixels)))
    distance = np.square(np.array(z)[..., None, :] - np.array(loaded.codes.quantizer.codebook)).sum(-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    np.testing.assert_array_equal(codes, encode_to_codes(loaded, pixels))
    back = loaded.decode_codes(codes)
    wanted = (loaded.model.decode(loaded.model.latents(mx.array(to_signed(pixels)))) + 1) / 2
    np.testing.assert_allclose(back, np.clip(wanted, 0, 1), atol=1e-6)
    assert loaded.codes.codebook_size == 16
    assert loaded.codes.factor == 2


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["autoencoder", *arguments])


def test_the_command_line_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = write_run(tmp_path)
    run("train", str(toml), "--set", VQ[0], "--set", "steps=2")
    folder = capsys.readouterr().out.strip().splitlines()[-1]
    rows, file = str(tmp_path / "rows.jsonl"), str(tmp_path / "codes.safetensors")
    images = ["--images", str(tmp_path / "pictures")]
    run("encode", folder, rows, *images, "--flips", "-o", file)
    cache = LatentCache(file, CODES)
    assert cache.shape == (12, 2, 4, 4)
    loaded = load_autoencoder(folder)
    ref = ImageRef(open_images(tmp_path / "pictures"), "3.png")
    pixels = np.array(Image.open(tmp_path / "pictures" / "3.png"))[None]
    np.testing.assert_array_equal(cache.load([ref]), encode_to_codes(loaded, pixels))
    np.testing.assert_array_equal(cache.load([ref], [True]), encode_to_codes(loaded, pixels[:, :, ::-1]))
    for flag in ([], ["--preview"]):
        capsys.readouterr()
        run("decode", folder, file, "-o", str(tmp_path / "out"), "--count", "2", *flag)
        made = [np.array(Image.open(line)) for line in capsys.readouterr().out.split()]
        assert [one.shape for one in made] == [(8, 8, 3) if not flag else (4, 4, 3)] * 2
    capsys.readouterr()
    run("info", folder, "--rows", rows, *images, "--no-frechet")
    shown = capsys.readouterr().out
    assert "16 codes" in shown
    assert "psnr" in shown


# ---- bad input ----


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    kl = load_autoencoder(save_autoencoder(tmp_path / "kl", kl_model()))
    vq = load_autoencoder(save_autoencoder(tmp_path / "vq", vq_model()))
    with pytest.raises(UserError, match="has no codebook"):
        kl.encode_codes(mx.zeros((1, 8, 8, 3)))
    with pytest.raises(UserError, match="has a codebook of 16 codes"):
        _ = vq.latents
    with pytest.raises(UserError, match=r"codes from 0 to 16: this codebook has 16"):
        vq.decode_codes(mx.array([[[0, 16]]]))
    with pytest.raises(UserError, match=r"codes of shape \[2, 2\]"):
        vq.decode_codes(mx.zeros((2, 2), mx.int32))
    with pytest.raises(UserError, match=r"quantizer.codes is 1, expected 2 or more"):
        QuantizerConfig(1)


def test_a_folder_whose_codebook_has_another_size_is_refused(tmp_path: Path) -> None:
    folder = save_autoencoder(tmp_path / "vq", vq_model())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"codes": 16', '"codes": 32'))
    with pytest.raises(UserError, match=r"quantizer.codebook has shape \[16, 3\], expected \[32, 3\]"):
        load_autoencoder(folder)
