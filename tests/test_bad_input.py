"""Bad input through the command line: one line that names the thing, exit code 2, nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlx_transfusion
from mlx_transfusion.images import save_png

Cli = Callable[..., Any]
Rejected = Callable[..., None]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def rejected(cli: Cli, folder: Path) -> Rejected:
    """`rejected("part of the message", *arguments)`: exit 2, one line on stderr, no output, no new file."""

    def check(message: str, *arguments: object, stdin: str = "") -> None:
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        result = cli(*arguments, stdin=stdin)
        assert result.code == 2, result
        assert result.out == ""
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    return check


@pytest.fixture
def model_copy(tiny_model_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, folder / "model"))


# ---- flags ----


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("unknown sampler 'dimm'; did you mean 'ddim'?", ["--sampler", "dimm"]),
        ("steps is 0: use at least 1", ["--steps", 0]),
        ("steps is -4", ["--steps", -4]),
        ("'--steps'", ["--steps", "many"]),
        ("guidance is -1.0", ["--guidance", -1]),
        ("guidance is nan", ["--guidance", "nan"]),
        ("guidance interval", ["--guidance-interval", 1.5, 0.5]),
        ("did you mean 'karras'?", ["--spacing", "karas"]),
        ("seed -1 is out of range", ["--seed", -1]),
        ("seed 18446744073709551616 is out of range", ["--seed", 1 << 64]),
        ("'--seed'", ["--seed", "x"]),
        ("a --seed is given twice", ["--seed", 1, "--seed", 1]),
        ("--num-images is 0", ["--num-images", 0]),
        ("--num-images 3 with 2 seeds", ["--num-images", 3, "--seed", 1, "--seed", 2]),
        ("batch_size is 0", ["--batch-size", 0]),
        ("--preview-every is 0", ["--preview-every", 0]),
        ("this model paints 8x8 pictures only", ["--width", 512]),
        ("this model paints 8x8 pictures only", ["--height", 9]),
        ("expected a name that ends in .png", ["--output", "a.jpg"]),
        ("--stepz", ["--stepz", 3]),
        ("the prompt is too long", ["--negative-prompt", "cat " * 90]),
    ],
)
def test_flags_of_generate(
    rejected: Rejected, tiny_model_dir: Path, message: str, flags: list[object]
) -> None:
    rejected(message, "generate", "red heart", "--model", tiny_model_dir, *flags)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("give either a PROMPT, --prompt-file or --from", []),
        ("give either a PROMPT, --prompt-file or --from", ["moon", "--prompt-file", "-"]),
        ("give either a PROMPT, --prompt-file or --from", ["moon", "--from", "a.png"]),
        ("the prompt is empty", [""]),
        ("the prompt is empty", [" \n "]),
        ("the prompt is too long", ["cat " * 90]),
        ("holds no prompt", ["--prompt-file", "-"]),
        ("cannot read it", ["--prompt-file", "none.txt"]),
        ("leave out --seed", ["--from", "a.png", "--seed", 1]),
        ("a.png: cannot read the image", ["--from", "a.png"]),
    ],
)
def test_prompts(rejected: Rejected, tiny_model_dir: Path, message: str, arguments: list[object]) -> None:
    rejected(message, "generate", *arguments, "--model", tiny_model_dir)


def test_prompt_files(rejected: Rejected, folder: Path, tiny_model_dir: Path) -> None:
    (folder / "empty.txt").write_text("\n \n")
    rejected("holds no prompt", "generate", "--prompt-file", "empty.txt", "--model", tiny_model_dir)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    rejected("not UTF-8", "generate", "--prompt-file", "latin.txt", "--model", tiny_model_dir)
    (folder / "two.txt").write_text("moon\n" + "cat " * 90)
    # The second prompt is found bad before the first is painted.
    rejected("too long", "generate", "--prompt-file", "two.txt", "--model", tiny_model_dir)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("the prompt is empty", [""]),
        ("the prompt is empty", ["-"]),
        ("the prompt is too long", ["cat " * 90]),
        ("temperature is -1.0", ["moon", "--temp", -1]),
        ("top_p is 0.0", ["moon", "--top-p", 0]),
        ("top_k is -1", ["moon", "--top-k", -1]),
        ("repetition_penalty is 0.0", ["moon", "--repetition-penalty", 0]),
        ("max_tokens is 0", ["moon", "--max-tokens", 0]),
        ("max_images is -1", ["moon", "--max-images", -1]),
        ("a stop text is empty", ["moon", "--stop", ""]),
        ("seed -1 is out of range", ["moon", "--seed", -1]),
        ("did you mean 'heun'?", ["moon", "--sampler", "huen"]),
        ("Missing argument", []),
    ],
)
def test_flags_of_complete(
    rejected: Rejected, tiny_model_dir: Path, message: str, arguments: list[object]
) -> None:
    rejected(message, "complete", *arguments, "--model", tiny_model_dir)


# ---- images ----


def test_images_to_describe(rejected: Rejected, folder: Path, tiny_model_dir: Path) -> None:
    def describe(message: str, *names: str) -> None:
        rejected(message, "describe", *names, "--model", tiny_model_dir)

    (folder / "empty.png").touch()
    describe("empty.png: empty image file (0 bytes)", "empty.png")
    (folder / "text.png").write_text("not an image")
    describe("text.png: cannot decode the image", "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save("good.png")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    describe("half.png: cannot decode the image", "half.png")
    describe("none.png: cannot read the image: No such file", "none.png")
    describe("cannot read the image: Is a directory", str(folder))
    # A bad image among good ones is found before anything is said.
    describe("none.png", "good.png", "none.png")
    describe("Missing argument")


def test_pictures_to_repeat(rejected: Rejected, folder: Path, tiny_model_dir: Path) -> None:
    def repeat(message: str, name: str) -> None:
        rejected(message, "generate", "--from", name, "--model", tiny_model_dir)

    (folder / "empty.png").touch()
    repeat("0 bytes", "empty.png")
    (folder / "text.png").write_text("not an image")
    repeat("not a readable PNG", "text.png")
    Image.new("RGB", (8, 8)).save("plain.png")
    repeat("plain.png: holds no settings", "plain.png")
    pixels = np.zeros((8, 8, 3), np.uint8)
    good = {
        "prompt": "moon", "seed": 1, "sampler": "ddim", "steps": 2, "spacing": "uniform", "guidance": 1.0,
        "guidance_interval": [0.0, 1.0], "negative_prompt": "", "model": "tiny",
        "batch": {"size": 1, "row": 0},
    }  # fmt: skip
    for key, value in (
        ("seed", None),
        ("steps", "x"),
        ("batch", 3),
        ("guidance_interval", [1]),
        ("prompt", None),
    ):
        broken = dict(good)
        if value is None:
            del broken[key]
        else:
            broken[key] = value
        save_png("broken.png", pixels, broken)
        repeat("broken.png: its settings are damaged", "broken.png")
    save_png("broken.png", pixels, good | {"batch": {"size": 2, "row": 2}})
    repeat("broken.png: its settings are damaged", "broken.png")
    save_png("future.png", pixels, good | {"sampler": "magic"})
    repeat("unknown sampler 'magic'", "future.png")


def test_info_of_what_is_neither_model_nor_picture(rejected: Rejected, folder: Path) -> None:
    (folder / "a.png").write_text("x")
    rejected("not a readable PNG", "info", "a.png")
    rejected("b.png: cannot read the image", "info", "b.png")
    rejected('model "nowhere" does not exist', "info", "nowhere")
    rejected('preset "9b" is unknown', "info", "--preset", "9b")
    rejected("give either", "info", "nowhere", "--preset", "7b")


# ---- models ----


def test_models_that_are_none(rejected: Rejected, folder: Path) -> None:
    for name, message in (
        ("nowhere", 'model "nowhere" does not exist'),
        ("./no/where", "does not exist"),
        ("nobody/nothing", "Hugging Face hub cannot give it"),
        (str(folder), "is not a model folder: it has no config.json"),
    ):
        rejected(message, "generate", "moon", "--model", name)
        rejected(message, "complete", "moon", "--model", name)
    (folder / "file").touch()
    rejected("file is not a model folder", "generate", "moon", "--model", "file")


def test_damaged_models(rejected: Rejected, model_copy: Path) -> None:
    def generate(message: str) -> None:
        rejected(message, "generate", "moon", "--model", model_copy)

    weights, config, tokenizer = (
        model_copy / n for n in ("model.safetensors", "config.json", "tokenizer.model")
    )
    data = weights.read_bytes()
    for corrupt in (b"", b"garbage", data[:-8], data[:40]):
        weights.write_bytes(corrupt)
        generate("model.safetensors: corrupt weights")
    weights.unlink()
    generate("weight files are missing: model.safetensors")
    weights.write_bytes(data)

    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"num_layers": 2}))
    generate('config.json: unknown key "num_layers"')
    config.write_text(json.dumps(fields | {"hidden_sise": 2}))
    generate('did you mean "hidden_size"?')
    config.write_text(json.dumps(fields | {"patch_size": "4"}))
    generate("patch_size: expected int, found '4'")
    config.write_text(json.dumps(fields | {"intermediate_size": 48}))
    generate("has shape [64, 32], expected [48, 32]")
    config.write_text(json.dumps(fields | {"image_channels": 8, "image_mean": [0.0] * 8}))
    generate("the weights do not fit the config")
    config.write_text("{")
    generate("config.json: not valid JSON")
    config.write_text(json.dumps(fields))

    tokenizer.write_bytes(b"garbage")
    generate("not a valid SentencePiece model")
    tokenizer.unlink()
    generate("no tokenizer.model")


def test_latent_models_paint_no_pictures(
    rejected: Rejected, folder: Path, make_model: Any, tiny_config: Any, tiny_tokenizer: Any
) -> None:
    import dataclasses

    from mlx_transfusion.model_io import save_model

    latent = dataclasses.replace(tiny_config, image_channels=8, image_mean=(0.0,) * 8)
    save_model(folder / "latent", make_model(latent), tiny_tokenizer)
    rejected("makes latents of 8 channels", "generate", "moon", "--model", "latent")


# ---- output ----


def test_output_folders(
    rejected: Rejected, folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tried before anything is painted."""
    monkeypatch.setattr("mlx_transfusion.text_to_image.paint", lambda *_, **__: pytest.fail("painted"))
    (folder / "file").touch()
    rejected("output folder file cannot be written", "generate", "moon", "--model", tiny_model_dir,
             "--output", "file/a.png")  # fmt: skip
    rejected("output folder file cannot be written", "complete", "moon", "--model", tiny_model_dir,
             "--output", "file/a.png")  # fmt: skip
    if os.geteuid():
        (folder / "closed").mkdir(mode=0o500)
        rejected("output folder closed cannot be written", "generate", "moon", "--model", tiny_model_dir,
                 "--output", "closed/a.png")  # fmt: skip


# ---- train, evaluate, tokenizer ----


def test_configs(rejected: Rejected, folder: Path) -> None:
    rejected("none.toml", "train", "none.toml")
    rejected("none.toml", "evaluate", "--config", "none.toml")
    (folder / "bad.toml").write_text("steps = ")
    rejected("bad.toml: not valid TOML", "train", "bad.toml")
    rejected("bad.toml", "evaluate", "--config", "bad.toml")
    rejected("no.txt", "tokenizer", "train", "no.txt")


# ---- the process ----


def test_the_real_process_prints_one_line(folder: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(mlx_transfusion.__file__).parents[1]),
        "MLX_TRANSFUSION_BLAS": "off",
    }
    for arguments in (["generate", "moon", "--model", "nowhere"], ["generat"], ["generate", "--stepz"]):
        run = subprocess.run(
            [sys.executable, "-m", "mlx_transfusion", *arguments],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 2
        assert run.stdout == ""
        assert run.stderr.startswith("error: ")
        assert run.stderr.count("\n") == 1
