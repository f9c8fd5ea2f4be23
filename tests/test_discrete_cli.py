"""The command line on a model of discrete pictures: encode, train, generate, describe, complete, info, evaluate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from autoencoder_tools import randomize
from PIL import Image
from test_discrete_training import TABLES
from tiny_evaluation import write_evaluation
from tiny_training import top, write_run

from mlx_transfusion.autoencoder.folder import save_autoencoder
from mlx_transfusion.cli import main
from mlx_transfusion.evaluation.set_distances import evaluate_distances
from mlx_transfusion.images import read_record
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig, QuantizerConfig
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.tokenizer import Tokenizer

Cli = Callable[..., Any]
"""A command line of the fixture `cli`: its exit code, output and messages."""


def quantizer(codes: int) -> AutoencoderVQ:
    """8x8 pixels to 2x2 codes."""
    config = AutoencoderConfig(
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=8,
        quantizer=QuantizerConfig(codes),
    )  # fmt: skip
    model = AutoencoderVQ(config)
    randomize(model)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Captioned pictures, two quantizers, the codes of the first, and a training TOML."""
    folder = tmp_path_factory.mktemp("discrete-cli")
    sets = top(steps=40, save_every=50, ema=0.5, output=str(folder / "run"))
    data = 'autoencoder = "vq"\ncaption_first = 1\ncaption_drop = 0.1'
    write_run(folder, tiny_tokenizer).write_text(sets + TABLES.replace("[data]", f"[data]\n{data}"))
    for codes in (8, 16):
        save_autoencoder(folder / ("vq" if codes == 8 else "larger"), quantizer(codes))
    run("autoencoder", "encode", folder / "vq", folder / "pairs.jsonl", "--images", folder / "pictures",
        "-o", folder / "codes.safetensors")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The folder of the last checkpoint."""
    run("train", place / "train.toml")
    return place / "run" / "checkpoints" / "step-00000040"


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def test_generate_repeats_what_it_painted(cli: Cli, trained: Path, tmp_path: Path) -> None:
    flags = ["--image-temp", "0.9", "--image-top-p", "0.95", "--guidance", "2", "-n", "2", "--seed", "3"]
    made = cli("generate", "red heart", "-m", trained, *flags, "--batch-size", "2", "-o", tmp_path / "a.png")
    assert made.code == 0, made.err
    first, second = (Path(line) for line in made.out.split())
    record = read_record(first)
    expected = {
        "sampler": "tokens",
        "steps": 4,
        "image_temperature": 0.9,
        "image_top_p": 0.95,
        "guidance": 2.0,
    }
    assert {key: record[key] for key in expected} == expected
    again = cli("generate", "--from", second, "-m", trained, "-o", tmp_path / "b.png")
    assert again.code == 0, again.err
    with Image.open(second) as one, Image.open(tmp_path / "b.png") as other:
        assert one.size == (8, 8)
        np.testing.assert_array_equal(np.array(one), np.array(other))
    preview = cli("generate", "red heart", "-m", trained, "--preview-every", "3", "-o", tmp_path / "c.png")
    assert preview.code == 0
    assert len(list(tmp_path.glob("c*.png"))) == 2


def test_describe_complete_and_info(cli: Cli, trained: Path, place: Path, tmp_path: Path) -> None:
    said = cli("describe", place / "pictures" / "red-star.png", "-m", trained, "--max-tokens", "4", "--json")
    assert said.code == 0, said.err
    written = cli("complete", "blue moon", "-m", trained, "--json", "--seed", "1", "-o", tmp_path / "c.png")
    assert written.code == 0, written.err
    events = [json.loads(line) for line in written.out.splitlines()]
    pictures = [event for event in events if "file" in event]
    assert [event["settings"]["sampler"] for event in pictures[:1]] == ["tokens"]
    assert Path(pictures[0]["file"]).is_file()
    facts = cli("info", trained)
    assert "8x8, 4 codes of 8" in facts.out
    assert '"name": "tokens"' in cli("info", trained, "--json").out


def test_the_autoencoder_travels_with_the_model(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert (trained / "autoencoder" / "config.json").is_file()
    bare = shutil.copytree(trained, tmp_path / "bare")
    shutil.rmtree(bare / "autoencoder")
    one_line(cli("generate", "red heart", "-m", bare, "-o", tmp_path / "a.png"), "its folder has none")
    one_line(cli("describe", trained / "no.png", "-m", trained), "cannot read the image")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "9"], "writes a picture as 4 tokens, and steps 9 is for denoising"),
        (["--sampler", "ddim"], "sampler ddim is for denoising"),
        (["--angles", "1.1"], "angles .* is for denoising"),
        (["--guidance-interval", "0.1", "1.0"], "guidance_interval .* is for denoising"),
        (["--image-top-p", "0"], "top_p is 0"),
        (["--image-temp", "-1"], "temperature is -1"),
    ],
)
def test_settings_that_do_not_fit(
    cli: Cli, trained: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    one_line(cli("generate", "red heart", "-m", trained, *flags, "-o", tmp_path / "a.png"), message)
    assert not list(tmp_path.iterdir())


def test_a_diffusion_model_has_no_image_temperature(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    flags = ["--image-temp", "0.5", "-o", tmp_path / "a.png"]
    one_line(cli("generate", "red heart", "-m", tiny_model_dir, *flags), "denoises its pictures, and")


def test_autoencoders_that_do_not_fit(cli: Cli, place: Path, trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained, tmp_path / "other")
    shutil.rmtree(other / "autoencoder")
    shutil.copytree(place / "larger", other / "autoencoder")
    wrong = "its codebook has 16 codes, and the model's vocabulary has places for 8"
    one_line(cli("generate", "red heart", "-m", other, "-o", tmp_path / "a.png"), wrong)
    one_line(
        cli("edit", place / "pictures" / "red-star.png", "blue", "-m", trained),
        "an edit needs a diffusion model",
    )
    config = ["train", place / "train.toml", "--set", f"output={tmp_path / 'run'}", "--set"]
    one_line(cli(*config, f"data.autoencoder={place / 'larger'}"), "stale: made by autoencoder")
    one_line(cli(*config, "model.codebook_size=16"), "its codebook has 8 codes, .* has places for 16")
    one_line(cli(*config, "model.codebook_size=4"), "its codebook has 8 codes, .* has places for 4")
    assert not (tmp_path / "run").exists()


def one_line(result: Any, message: str) -> None:
    """Exit code 2 and one line with the message."""
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert re.search(message, lines[0]), lines


def test_sample_grids_are_painted(cli: Cli, place: Path, tmp_path: Path) -> None:
    sets = [f"output={tmp_path / 'run'}", "steps=1", "sample.every=1", "sample.prompts=['moon','red star']"]
    done = cli("train", place / "train.toml", *(part for one in sets for part in ("--set", one)))
    assert done.code == 0, done.err
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


class Pixels:
    """Features that are some of the pixels."""

    name, fingerprint = "pixels", "0"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1)[:, ::37].astype(np.float32) / 255


def test_evaluate(cli: Cli, trained: Path, tmp_path: Path) -> None:
    """All measures, on pictures of another size than the model's."""
    config, report = write_evaluation(tmp_path) / "evaluate.toml", tmp_path / "report.json"
    done = cli("evaluate", "-m", trained, "-c", config, "--set", "generation={batch_size=4}", "-o", report)
    assert done.code == 0, done.err
    assert "perplexity per code" in done.out
    found = json.loads(report.read_text())
    assert found["losses"]["val"]["codes"]["with_caption"]["tokens"] == 5 * 4
    assert found["settings"]["generation"]["sampler"] == "tokens"
    assert found["text"]["model"]["perplexity"] > 1
    one_line(cli("evaluate", "-m", trained, "-c", config), "steps 2 is for denoising")
    sets = ["generation={batch_size=4}", "counts.frechet=6", "counts.references=6"]
    found = evaluate_distances(trained, config, overrides=sets, extractor=Pixels())
    assert found["distances"]["val"]["model"]["frechet"]["value"] > 0
