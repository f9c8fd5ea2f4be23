"""Latents on disk, previews, and the verb `autoencoder`; bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from autoencoder_tools import randomize
from PIL import Image

from mlx_transfusion.autoencoder.decoding import decode_latents
from mlx_transfusion.autoencoder.folder import LoadedAutoencoder, load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.latents import encode_pixels, write_cache
from mlx_transfusion.autoencoder.pictures import to_signed
from mlx_transfusion.autoencoder.preview import fit_preview
from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import write_safetensors
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.autoencoder_tiles import Tiling
from mlx_transfusion.training.image_store import ImageRef, open_images
from mlx_transfusion.training.latents import LatentCache

CONFIG = AutoencoderConfig(
    block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=2.0, shift_factor=0.1,
    sample_size=8,
)  # fmt: skip
COUNT = 18


def save(folder: Path, seed: int = 0, **changes: object) -> LoadedAutoencoder:
    config = AutoencoderConfig.from_dict(CONFIG.to_dict() | changes)
    model = AutoencoderKL(config)
    randomize(model, seed)
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    latents = np.array(model.normalize(model.encode(mx.array(pixels)).mean))
    return load_autoencoder(save_autoencoder(folder, model, preview=fit_preview(latents, pixels)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder, eighteen pictures and rows that name them."""
    folder = tmp_path_factory.mktemp("latents")
    save(folder / "ae")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = []
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "pictures" / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"picture {i}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return folder


def refs(place: Path) -> list[ImageRef]:
    store = open_images(place / "pictures")
    return [ImageRef(store, f"{i}.png") for i in range(COUNT)]


def pixels_of(place: Path, index: int) -> np.ndarray:
    return np.array(Image.open(place / "pictures" / f"{index}.png"))[None]


@pytest.fixture(scope="module")
def cache(place: Path) -> LatentCache:
    return LatentCache(
        write_cache(
            place / "cache.safetensors", load_autoencoder(place / "ae"), refs(place), (8, 8), flips=True
        )
    )


def test_the_cache_gives_what_encoding_gives(place: Path, cache: LatentCache) -> None:
    loaded = load_autoencoder(place / "ae")
    pixels = np.concatenate([pixels_of(place, i) for i in (17, 2)])
    chosen = [refs(place)[17], refs(place)[2]]
    np.testing.assert_allclose(cache.load(chosen), encode_pixels(loaded, pixels), atol=1e-5)
    mirrored = cache.load(chosen, [True, False])
    np.testing.assert_allclose(mirrored[0], encode_pixels(loaded, pixels[:1, :, ::-1])[0], atol=1e-5)
    np.testing.assert_array_equal(mirrored[1], cache.load(chosen)[1])
    raw = loaded.model.encode(mx.array(to_signed(pixels))).mean
    np.testing.assert_allclose(cache.load(chosen), (np.array(raw) - 0.1) * 2, atol=1e-5)
    assert cache.shape == (COUNT, 2, 4, 4, 3)


def test_it_is_a_safetensors_file_and_stays_on_disk(place: Path, cache: LatentCache) -> None:
    whole = mx.load(str(cache.path))["latents"]
    np.testing.assert_array_equal(np.array(whole)[:, 0], cache.load(refs(place)))
    assert isinstance(cache._latents, np.memmap)


def test_half_precision_takes_half_the_room(place: Path, cache: LatentCache) -> None:
    small = LatentCache(
        write_cache(
            place / "half.safetensors",
            load_autoencoder(place / "ae"),
            refs(place),
            (8, 8),
            flips=True,
            dtype="float16",
        )
    )
    assert small.path.stat().st_size < 0.6 * cache.path.stat().st_size
    np.testing.assert_allclose(small.load(refs(place)), cache.load(refs(place)), rtol=2e-3, atol=1e-4)


def test_latents_of_another_autoencoder_are_stale(place: Path, cache: LatentCache, tmp_path: Path) -> None:
    same = load_autoencoder(place / "ae")
    cache.check(same.fingerprint, (4, 4, 3), "model")
    for other in (save(tmp_path / "weights", seed=1), save(tmp_path / "scale", scaling_factor=3.0)):
        with pytest.raises(
            UserError, match=r"cache.safetensors: stale: made by autoencoder .*: encode the data set again"
        ):
            cache.check(other.fingerprint, (4, 4, 3), str(other.path))
    with pytest.raises(UserError, match=r"latents of shape \[4, 4, 3\], model expects \[4, 4, 8\]"):
        cache.check(same.fingerprint, (4, 4, 8), "model")


def test_pictures_that_are_not_there(place: Path, cache: LatentCache) -> None:
    with pytest.raises(UserError, match=r"holds no latents of .*new.png.*: encode the data set again"):
        cache.load([ImageRef(open_images(place / "pictures"), "new.png")])
    plain = LatentCache(
        write_cache(place / "plain.safetensors", load_autoencoder(place / "ae"), refs(place)[:1], (8, 8))
    )
    with pytest.raises(UserError, match="holds no mirrored pictures"):
        plain.load(refs(place)[:1], [True])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], "bytes, expected"),
        (lambda data: data[:50], "no file of latents"),
        (lambda data: b"", "no file of latents"),
        (lambda data: b"\xff" * 8 + data[8:], "no file of latents"),
        (
            lambda data: data.replace(b"mlx-transfusion-latents", b"mlx-transfusion-latentz"),
            "no file of latents",
        ),
        (lambda data: data.replace(b'"dtype": "F32"', b'"dtype": "F99"'), "no file of latents"),
    ],
)
def test_damaged_files_are_refused(
    cache: LatentCache, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damage(cache.path.read_bytes()))
    with pytest.raises(UserError, match=message):
        LatentCache(file)


def test_an_interrupted_encoding_leaves_nothing(place: Path, tmp_path: Path) -> None:
    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(
            tmp_path / "c.safetensors", load_autoencoder(place / "ae"), refs(place), (8, 8), progress=stop
        )
    assert not list(tmp_path.iterdir())


def test_a_large_picture_is_encoded_and_decoded_in_tiles(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_autoencoder(place / "ae")
    big = np.random.default_rng(2).integers(0, 256, (1, 8, 2 * Tiling().tile + 8, 3), np.uint8)
    latents = encode_pixels(loaded, big)
    assert latents.shape == (1, 4, Tiling().tile + 4, 3)
    whole = np.array(loaded.model.normalize(loaded.model.encode(mx.array(to_signed(big))).mean))
    np.testing.assert_allclose(latents, whole, atol=0.2)
    assert decode_latents(loaded, latents).shape == big.shape
    with pytest.raises(UserError, match="use the autoencoder that they were made with"):
        decode_latents(loaded, latents[..., :2])


def test_the_preview_is_the_best_linear_one() -> None:
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(5, 4, 4, 6)).astype(np.float32)
    weight, bias = rng.normal(size=(6, 3)) * 0.1, np.array([0.1, -0.2, 0.3])
    small = latents @ weight + bias
    pixels = np.repeat(np.repeat(small, 2, 1), 2, 2).astype(np.float32)
    detail = np.kron(rng.normal(size=(5, 4, 4, 3)), np.array([[1, -1], [-1, 1]])[None, :, :, None])
    fit = fit_preview(latents, (pixels + detail).astype(np.float32))  # what a square's mean does not see
    np.testing.assert_allclose(fit.weight, weight, atol=1e-4)
    np.testing.assert_allclose(fit.bias, bias, atol=1e-4)
    np.testing.assert_array_equal(
        fit(latents), np.clip(np.round((small + 1) * 127.5), 0, 255).astype(np.uint8)
    )


# ---- folders ----


def test_a_folder_is_read_back(place: Path, tmp_path: Path) -> None:
    loaded = load_autoencoder(place / "ae")
    again = load_autoencoder(save_autoencoder(tmp_path / "again", loaded.model, preview=loaded.preview))
    assert again.config == loaded.config == CONFIG
    assert again.fingerprint == loaded.fingerprint
    assert again.preview is not None
    np.testing.assert_array_equal(again.preview.weight, loaded.preview.weight)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of an autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="is diffusers' folder: convert it first"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "transfusion"}')
    with pytest.raises(UserError, match="model_type is 'transfusion', expected \"autoencoder_kl\""):
        load_autoencoder(tmp_path)
    save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"latent_channels": 4}))
    with pytest.raises(UserError, match="the weights do not fit the config"):
        load_autoencoder(tmp_path)
    save(tmp_path)
    write_safetensors(tmp_path / "preview.safetensors", {"weight": mx.zeros((4, 3)), "bias": mx.zeros((3,))})
    with pytest.raises(UserError, match="no map from 3 latent channels to pixels"):
        load_autoencoder(tmp_path)


# ---- the command line ----


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["autoencoder", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_encode_and_decode_on_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.safetensors"
    assert run("encode", place / "ae", place / "rows.jsonl", "--images", place / "pictures", "-o", file) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert LatentCache(file).names == [f"{i}.png" for i in range(COUNT)]
    assert run("decode", place / "ae", file, "-o", tmp_path / "out", "--count", 2) == 0
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["0.png", "1.png"]
    loaded = load_autoencoder(place / "ae")
    expected = decode_latents(loaded, encode_pixels(loaded, pixels_of(place, 1)))
    found = np.array(Image.open(tmp_path / "out" / "1.png")).astype(int)
    assert np.abs(found - expected[0]).max() <= 1  # other pictures in its batch: the last bit
    assert run("decode", place / "ae", file, "-o", tmp_path / "small", "--preview") == 0
    assert Image.open(tmp_path / "small" / "0.png").size == (4, 4)


def test_one_picture(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    assert run("encode", place / "ae", place / "pictures" / "3.png", "-o", file, "--size", 12, "--half") == 0
    assert LatentCache(file).shape == (1, 1, 6, 6, 3)


def test_info_tells_and_measures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rows", place / "rows.jsonl", "--images", place / "pictures", "--no-frechet", "--json")
    assert run("info", place / "ae", *flags) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latents"] == "8x8x3 -> 4x4x3 (factor 2)"
    assert facts["fingerprint"] == load_autoencoder(place / "ae").fingerprint
    assert facts["reconstruction"]["pictures"] == COUNT
    assert 0 < facts["reconstruction"]["psnr"] < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "ae", "nothing.png", "-o", "x.safetensors"), "no such picture or file of rows"),
        (
            ("encode", "ae", "rows.jsonl", "--images", "pictures", "-o", "x", "--size", "9"),
            "takes multiples of 2",
        ),
        (
            ("encode", "ae", "rows.jsonl", "--images", "pictures", "-o", "x", "--size", "8", "--size", "8x4"),
            "no picture is nearest to 8x4 in aspect: leave this size out",
        ),
        (("encode", "ae", "rows.jsonl", "-o", "x", "--size", "8by4"), '"8by4" is no picture size'),
        (("encode", "nowhere", "rows.jsonl", "-o", "x"), "no folder of an autoencoder"),
        (("decode", "ae", "rows.jsonl", "-o", "out"), "no file of latents"),
        (("decode", "other", "cache.safetensors", "-o", "out"), "stale: made by autoencoder"),
        (("train", "missing.toml"), "cannot read the training config"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, cache: LatentCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    if not Path("other").exists():
        save(Path("other"), seed=5)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
