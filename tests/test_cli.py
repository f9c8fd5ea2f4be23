"""The command line: files, names, what goes to stdout and what to stderr, and repeating a picture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image

import mlx_transfusion
from mlx_transfusion.cli import app, terminal
from mlx_transfusion.config import PRESETS, ModelConfig
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.quantization import parameter_count
from mlx_transfusion.tokenizer import Tokenizer

Cli = Callable[..., Any]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(mlx_transfusion.__file__).parents[1]), "NO_COLOR": "1"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def paint(cli: Cli, tiny_model_dir: Path) -> Cli:
    """`generate` with the tiny model and few steps."""

    def run(*arguments: object, **more: str) -> Any:
        return cli("generate", *arguments, "--model", tiny_model_dir, "--steps", 3, **more)

    return run


def pixels(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file))


# ---- start-up ----


def every_verb(command: Any, name: str = "") -> list[str]:
    """Names of a command's subcommands, theirs too."""
    found = []
    for verb, below in getattr(command, "commands", {}).items():
        found += [f"{name} {verb}".strip(), *every_verb(below, f"{name} {verb}")]
    return found


def test_help_imports_neither_mlx_nor_numpy() -> None:
    verbs = ["", *every_verb(typer.main.get_command(app))]
    assert {"generate", "train", "tokenizer train"} <= set(verbs)
    code = f"""
import sys
import typer.main
from mlx_transfusion.cli import app
command = typer.main.get_command(app)
for verb in {verbs}:
    try:
        command([*verb.split(), "--help"], prog_name="mlx-transfusion")
    except SystemExit as exit:
        heavy = [m for m in ("mlx", "numpy", "PIL", "sentencepiece", "huggingface_hub") if m in sys.modules]
        print("EXIT", exit.code, heavy)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert run.stdout.count("EXIT 0 []") == run.stdout.count("EXIT") == len(verbs)
    assert run.stdout.count("Usage: mlx-transfusion") == len(verbs)


def test_no_arguments_show_help(cli: Cli) -> None:
    result = cli()
    assert result.code == 0
    assert "generate" in result.out


def test_shell_completion_stays() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mlx_transfusion"], capture_output=True, text=True, check=True,
        env=ENVIRONMENT | {"_MLX_TRANSFUSION_COMPLETE": "complete_bash", "COMP_WORDS": "mlx-transfusion gen",
                           "COMP_CWORD": "1"},
    )  # fmt: skip
    assert run.stdout.split() == ["generate"]


# ---- generate ----


def test_one_picture(paint: Cli, tiny_model_dir: Path) -> None:
    result = paint("red heart", "--seed", 5)
    assert (result.code, result.out) == (0, "image.png\n")
    assert "seed 5" in result.err
    assert pixels("image.png").shape == (8, 8, 3)
    record = read_record("image.png")
    assert record == {
        "version": mlx_transfusion.__version__, "model": "tiny",
        "model_hash": load(tiny_model_dir).fingerprint, "prompt": "red heart", "negative_prompt": "",
        "seed": 5, "steps": 3, "sampler": "dpmpp_2m",
        "spacing": "uniform", "guidance": 3.0, "guidance_interval": [0.0, np.pi / 2],
        "width": 8, "height": 8, "batch": {"size": 1, "row": 0},
    }  # fmt: skip


def test_a_random_seed_is_recorded_and_told(paint: Cli) -> None:
    seeds = []
    for _ in range(2):
        result = paint("red heart")
        seed = read_record(result.out.strip())["seed"]
        assert f"seed {seed}" in result.err
        seeds.append(seed)
    assert seeds[0] != seeds[1]


def test_existing_files_stay(paint: Cli) -> None:
    assert paint("red heart", "--seed", 1).out == "image.png\n"
    first = Path("image.png").read_bytes()
    assert paint("red heart", "--seed", 2).out == "image_1.png\n"
    assert paint("red heart", "--seed", 3).out == "image_2.png\n"
    assert Path("image.png").read_bytes() == first
    assert paint("red heart", "--seed", 2, "--overwrite").out == "image.png\n"
    assert Path("image.png").read_bytes() == Path("image_1.png").read_bytes()


def test_names_of_several_pictures(paint: Cli) -> None:
    result = paint("moon", "--seed", 4, "--seed", 9, "--output", "out/a.png")
    assert result.out.split() == ["out/a_seed_4.png", "out/a_seed_9.png"]
    result = paint("moon", "--seed", 4, "--num-images", 3, "-o", "b")
    assert result.out.split() == ["b_seed_4.png", "b_seed_5.png", "b_seed_6.png"]
    assert [read_record(f)["seed"] for f in result.out.split()] == [4, 5, 6]
    np.testing.assert_array_equal(pixels("out/a_seed_4.png"), pixels("b_seed_4.png"))
    result = paint(
        "--prompt-file", "-", "--seed", 1, "--num-images", 2, "-o", "out", stdin="moon\n\n red cat \n"
    )
    assert result.out.split() == [f"out/image_prompt_{k}_seed_{s}.png" for k in (1, 2) for s in (1, 2)]
    assert [read_record(f)["prompt"] for f in result.out.split()] == ["moon", "moon", "red cat", "red cat"]


def test_prompt_file(paint: Cli) -> None:
    Path("prompts.txt").write_text("moon\nstar\n", encoding="utf-8")
    result = paint("--prompt-file", "prompts.txt", "--seed", 1)
    assert result.out.split() == ["image_prompt_1.png", "image_prompt_2.png"]


@pytest.mark.parametrize("batch", [2, 5])
def test_batch_size_changes_neither_seeds_nor_names(paint: Cli, batch: int) -> None:
    """Also with prompts of different lengths, which are painted in another order."""
    prompts = "red heart\nmoon\nbig happy dog face\nmoon\n"
    a = paint("--prompt-file", "-", "--seed", 1, "-n", 2, "-o", "a.png", stdin=prompts)
    b = paint("--prompt-file", "-", "--seed", 1, "-n", 2, "-o", "b.png", "--batch-size", batch, stdin=prompts)
    assert sorted(a.out.split()) == sorted(line.replace("b_", "a_", 1) for line in b.out.split())
    for name in a.out.split():
        other = name.replace("a_", "b_", 1)
        one, two = read_record(name), read_record(other)
        assert (one["prompt"], one["seed"]) == (two["prompt"], two["seed"])
        assert np.abs(pixels(name).astype(int) - pixels(other)).max() <= 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_from_repeats_a_picture_exactly(
    paint: Cli, cli: Cli, tiny_model_dir: Path, batch: int, sampler: str
) -> None:
    first = paint(
        "red heart", "--seed", 3, "-n", 4, "--batch-size", batch, "--sampler", sampler, "--guidance", 2.5,
        "--guidance-interval", 0.1, 1.4, "--negative-prompt", "sad cat", "--spacing", "karras",
    )  # fmt: skip
    for name in first.out.split():
        again = cli("generate", "--from", name, "--model", tiny_model_dir, "-o", "again.png", "--overwrite")
        assert (again.code, again.out) == (0, "again.png\n")
        assert "warning" not in again.err
        np.testing.assert_array_equal(pixels("again.png"), pixels(name))
        assert read_record("again.png") == read_record(name)


def test_from_with_other_settings(cli: Cli, paint: Cli, tiny_model_dir: Path) -> None:
    paint("red heart", "--seed", 3, "--guidance", 2)
    result = cli("generate", "--from", "image.png", "--model", tiny_model_dir, "--steps", 5)
    record = read_record(result.out.strip())
    assert (record["steps"], record["guidance"], record["seed"]) == (5, 2.0, 3)


def test_from_warns_of_other_weights(
    cli: Cli, paint: Cli, tmp_path: Path, make_model: Callable[..., Transfusion], tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    paint("red heart", "--seed", 3)
    other = save_model(tmp_path / "other", make_model(tiny_config, 8), tiny_tokenizer)
    result = cli("generate", "--from", "image.png", "--model", other)
    assert result.code == 0
    assert result.err.startswith("warning: image.png was painted by weights")
    assert "of tiny" in result.err
    assert "of other" in result.err


def test_json(paint: Cli) -> None:
    result = paint("red heart", "--seed", 3, "--seed", 4, "--json", "--grid")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [set(row) for row in rows[:2]] == [{"file", "prompt", "seed", "settings", "seconds"}] * 2
    assert [row["seed"] for row in rows[:2]] == [3, 4]
    assert rows[0]["settings"] == read_record(rows[0]["file"])
    assert rows[2] == {"file": "image_grid.png", "pictures": 2}


def test_grid(paint: Cli, cli: Cli) -> None:
    result = paint("moon", "--seed", 4, "-n", 3, "--grid")
    assert result.out.split()[-1] == "image_grid.png"
    sheet = pixels("image_grid.png")
    assert sheet.shape == (18, 18, 3)
    np.testing.assert_array_equal(sheet[:8, 10:], pixels("image_seed_5.png"))
    assert [r["seed"] for r in read_record("image_grid.png")["pictures"]] == [4, 5, 6]
    assert "sheet of 3 pictures" in cli("generate", "--from", "image_grid.png").err


def test_previews(paint: Cli, cli: Cli, tiny_model_dir: Path) -> None:
    paint("moon", "--seed", 4, "-n", 2, "--batch-size", 2, "--preview-every", 2)
    names = sorted(p.name for p in Path().glob("*_step_*"))
    assert names == ["image_seed_4_step_002.png", "image_seed_5_step_002.png"]
    assert read_record(names[1])["preview_step"] == 2
    assert (pixels(names[1]) != pixels("image_seed_5.png")).any()
    cli("generate", "--from", names[1], "--model", tiny_model_dir, "-o", "full.png")
    np.testing.assert_array_equal(pixels("full.png"), pixels("image_seed_5.png"))


def test_size_flags_of_the_right_size(paint: Cli) -> None:
    assert paint("moon", "--width", 8, "--height", 8).code == 0


def test_ctrl_c_keeps_finished_pictures(tiny_model_dir: Path) -> None:
    command = [sys.executable, "-m", "mlx_transfusion", "generate", "moon", "--model", str(tiny_model_dir),
               "--seed", "1", "-n", "100000", "--steps", "2"]  # fmt: skip
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        names = [first, *process.stdout.read().split()]
        err = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in err
    # The signal may come between a picture's file and its line on stdout.
    files = sorted(p.name for p in Path().iterdir())
    assert set(names) <= set(files)
    assert len(files) - len(names) <= 1
    assert any(f"interrupted: {n} of 100000" in err for n in (len(files), len(files) - 1))
    assert all(read_record(name)["prompt"] == "moon" and pixels(name).shape == (8, 8, 3) for name in files)


def test_reader_that_leaves_early(tiny_model_dir: Path) -> None:
    command = (
        f'"{sys.executable}" -m mlx_transfusion info "{tiny_model_dir}" | head -1; echo ${{PIPESTATUS[0]}}'
    )
    run = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1] in ("0", "141")


# ---- describe and complete ----


def test_describe(cli: Cli, paint: Cli, tiny_model_dir: Path) -> None:
    paint("moon", "--seed", 1, "--seed", 2)
    flags = ("--model", tiny_model_dir, "--max-tokens", 5)
    one = cli("describe", "image_seed_1.png", *flags)
    assert one.code == 0
    assert one.out.strip()
    both = cli("describe", "image_seed_1.png", "image_seed_2.png", *flags)
    assert both.out.splitlines()[0] == f"image_seed_1.png: {one.out.strip()}"
    rows = [
        json.loads(line) for line in cli("describe", "image_seed_1.png", "--json", *flags).out.splitlines()
    ]
    assert rows == [{"file": "image_seed_1.png", "text": one.out.strip()}]


def test_complete(cli: Cli, tiny_model_dir: Path) -> None:
    flags = ("--model", tiny_model_dir, "--max-tokens", 40, "--steps", 2, "--temp", 3, "--seed", 2)
    result = cli("complete", "red heart", *flags, "--json")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert rows[-1] in ({"finished": "stop"}, {"finished": "length"})
    text = "".join(row.get("text", "") for row in rows)
    files = [row["file"] for row in rows if "file" in row]
    assert text
    assert "seed 2" in result.err
    plain = cli("complete", "-", *flags, "-o", "other.png", stdin="red heart")
    names = iter(sorted(Path().glob("other*.png")))
    expected = "".join(row["text"] if "text" in row else f"[{next(names)}]" for row in rows[:-1])
    assert plain.out == expected + "\n"
    for file in files:
        assert read_record(file)["completion"]["temperature"] == 3.0
        assert "repeat it with `complete`" in cli("generate", "--from", file).err


def test_complete_names_its_pictures(cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter([4, 10, 4, 2] * 2)
    monkeypatch.setattr("mlx_transfusion.interleave.sample_token", lambda logits, **_: next(tokens))
    flags = ("complete", "red heart", "--model", tiny_model_dir, "--steps", 2, "--seed", 2, "--temp", 1)
    assert "[image.png]" in cli(*flags).out
    assert sorted(p.name for p in Path().iterdir()) == ["image.png", "image_1.png"]
    cli(*flags, "--overwrite")
    assert sorted(p.name for p in Path().iterdir()) == ["image.png", "image_1.png"]


# ---- info ----


def test_info_of_the_presets(cli: Cli) -> None:
    for name, billions in (
        ("0.16b", 0.162),
        ("0.37b", 0.374),
        ("0.76b", 0.778),
        ("1.4b", 1.364),
        ("7b", 6.738),
    ):
        facts = json.loads(cli("info", "--preset", name, "--json").out)
        assert round(facts["parameters"]["transformer"] / 1e9, 3) == billions
        assert f"({billions:.3f} billion)" in cli("info", "--preset", name).out
    assert set(PRESETS) == {"0.16b", "0.37b", "0.76b", "1.4b", "7b"}


def test_info_tells_what_the_unet_adds(cli: Cli) -> None:
    """0.27 billion at the paper's width (section 3.3)."""
    plain, unet = (
        json.loads(cli("info", "--preset", name, "--json").out)["parameters"] for name in ("7b", "7b-unet")
    )
    assert round((unet["total"] - plain["total"]) / 1e9, 2) == 0.27
    assert unet["U-Net of patches"] == pytest.approx(unet["total"] - plain["total"], rel=1e-3)
    assert "U-Net of patches  267," in cli("info", "--preset", "7b-unet").out


def test_info_of_a_preset_takes_no_memory() -> None:
    """27 GB of weights, counted in a process that may not have 4."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from mlx_transfusion.cli import main; main(['info', '--preset', '7b'])"
    )
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS")
    environment = ENVIRONMENT | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "6.738 billion" in run.stdout


def test_info_of_a_model(cli: Cli, tiny_model_dir: Path, tiny_model: Transfusion) -> None:
    facts = json.loads(cli("info", tiny_model_dir, "--json").out)
    assert facts["model"] == "tiny"
    assert facts["parameters"]["total"] == parameter_count(tiny_model)
    parts = (tiny_model.patch_encoder, tiny_model.patch_decoder, tiny_model.angle_embedding)
    assert facts["parameters"]["patch layers"] == sum(parameter_count(part) for part in parts)
    assert facts["config"]["hidden_size"] == 32
    assert facts["bits a weight on disk"] == pytest.approx(32, rel=0.05)  # with headers
    assert set(facts["memory for generation"]) == {"weights as stored", "float32 (on a CPU)"}
    assert "8x8x3, 4 patches of 4x4" in cli("info", tiny_model_dir).out


def test_info_of_a_picture(cli: Cli, paint: Cli) -> None:
    paint("red heart", "--seed", 123456)
    out = cli("info", "image.png").out
    assert any(line.split() == ["prompt", "red", "heart"] for line in out.splitlines())
    assert any(line.split() == ["seed", "123456"] for line in out.splitlines())
    assert json.loads(cli("info", "image.png", "--json").out)["steps"] == 3


def test_info_of_the_installation(cli: Cli) -> None:
    facts = json.loads(cli("info", "--json").out)
    assert {"mlx-transfusion", "mlx", "device", "BLAS"} <= facts.keys()


# ---- train and evaluate: the flags that reach the library ----


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_train_and_distill_pass_their_flags(cli: Cli, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    calls: list[tuple[Any, ...]] = []
    config = SimpleNamespace(consistency=None if verb == "train" else object())

    def load_train_config(path: Path, overrides: list[str]) -> SimpleNamespace:
        calls.append((path, overrides))
        return config

    def train(config: SimpleNamespace, resume: bool) -> Path:
        calls.append((config, resume))
        return Path("last")

    monkeypatch.setattr("mlx_transfusion.training.config.load_train_config", load_train_config)
    monkeypatch.setattr("mlx_transfusion.training.trainer.train", train)
    result = cli(verb, "a.toml", "--set", "steps=3", "--set", "data.flip=0.5", "--no-resume")
    assert (result.code, result.out) == (0, "last\n")
    assert calls == [(Path("a.toml"), ["steps=3", "data.flip=0.5"]), (config, False)]
    cli(verb, "a.toml")
    assert calls[2:] == [(Path("a.toml"), []), (config, True)]
    cli(verb, "a.toml", "--set", "steps=3", "--skip-bad-rows")
    assert calls[4] == (Path("a.toml"), ["steps=3", "data.skip_bad_rows=true"])
    other = cli("distill" if verb == "train" else "train", "a.toml")
    assert (other.code, other.out) == (2, "")
    assert f"use the verb {verb}" in other.err


def test_evaluate_passes_its_flags(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def evaluate(
        *arguments: Any, data: Path | None, progress: Callable[[str, int, int], None], **_: Any
    ) -> dict[str, Any]:
        progress("half", 1, 2)
        calls.append((*arguments, data))
        return {"figure": 1}

    monkeypatch.setattr("mlx_transfusion.evaluation.report.evaluate", evaluate)
    monkeypatch.setattr("mlx_transfusion.evaluation.table.table", lambda report: f"figure {report['figure']}")
    result = cli(
        "evaluate", "--config", "a.toml", "--model", "m", "--output", "r.json", "--quick", "--data", "d"
    )
    assert (result.code, result.out) == (0, "figure 1\n")
    assert calls == [("m", Path("a.toml"), Path("r.json"), True, Path("d"))]
    assert json.loads(cli("evaluate", "-c", "a.toml", "--json").out) == {"figure": 1}


# ---- progress ----


def test_bars_are_for_terminals_and_on_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal.bar("paint", 2) as progress:
        progress.update(1, "step 1/4")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.bar("paint", 2) as progress:
        progress.update(1, "step 1/4")
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 1/4" in err
