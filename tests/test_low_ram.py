"""Training a converted model with what its steps do not need out of memory: the same numbers, less memory."""

from __future__ import annotations

import dataclasses
import errno
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import janusflow_tools
import mlx.core as mx
import mlx.nn as nn
import pytest
from family_tools import COLOURS, FAMILIES, album, model_folder, run_config
from tiny_training import assert_same, losses_of, state, write_jsonl

from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune import family_run
from mlx_transfusion.finetune.config import FinetuneConfig
from mlx_transfusion.finetune.families import PARTS, within
from mlx_transfusion.finetune.family_plan import estimate_family
from mlx_transfusion.finetune.memory import suggestions
from mlx_transfusion.finetune.run import NOTHING_IDLE, make_plan
from mlx_transfusion.model_io import flat_parameters, load, save_model
from mlx_transfusion.models.janusflow import JanusFlow
from mlx_transfusion.training.config import (
    AdapterTraining,
    ConsistencyConfig,
    DataConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)
from mlx_transfusion.training.trainer import Trainer, train

LORA = AdapterTraining(rank=2)
Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, an album with text, and one of pictures alone."""
    top = tmp_path_factory.mktemp("low-ram")
    out = {kind: model_folder(kind, top / kind) for kind in FAMILIES}
    out["texts"], out["pairs"] = album(top / "texts"), album(top / "pairs")
    write_jsonl(out["pairs"] / "train.jsonl", [{"image": f"{c}.png", "text": f"{c} square"} for c in COLOURS])
    return out


@pytest.fixture
def make(folders: dict[str, Path], tmp_path: Path) -> Make:
    """`make("bagel", "pairs", "out", steps=2)`: a run with mirrored pictures and validation."""

    def make_config(kind: str, pictures: str, output: str, **changes: Any) -> TrainConfig:
        rows = SourceConfig(str(folders[pictures] / "train.jsonl"), str(folders[pictures]))
        settings: dict[str, Any] = {
            "data": DataConfig((rows,), (rows,), caption_first=1.0, caption_drop=0.25, flip=0.5),
            "steps": 2, "save_every": 1, "valid_every": 2, "valid_batches": 1, "adapter": LORA,
        }  # fmt: skip
        config = run_config(folders[kind], folders[pictures], tmp_path / output)
        return dataclasses.replace(config, **(settings | changes))

    return make_config


def check_same_run(plain: TrainConfig, low: TrainConfig) -> None:
    """Both give the same losses and checkpoints, bit for bit."""
    one, other = train(plain), train(low)
    assert_same(state(one), state(other))
    assert losses_of(Path(plain.output)) == losses_of(Path(low.output))


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_is_the_same_bit_for_bit(kind: str, make: Make) -> None:
    check_same_run(make(kind, "pairs", "plain"), make(kind, "pairs", "low", low_ram=True))


def test_rows_of_text_and_latents_in_a_file(make: Make) -> None:
    """Rows of text keep the text head; without room in memory the latents are in a file, which goes with the run."""
    plain = make("janusflow", "texts", "plain")
    low = make("janusflow", "texts", "low", low_ram=True)
    check_same_run(plain, dataclasses.replace(low, data=dataclasses.replace(low.data, cache_gib=0.0)))
    assert {p.name for p in Path(low.output).iterdir()} == {p.name for p in Path(plain.output).iterdir()}


def test_a_whole_model_is_saved_whole_and_resumed(make: Make) -> None:
    plain, low = (make("janusflow", "texts", n, adapter=None, low_ram=n == "low") for n in ("plain", "low"))
    check_same_run(plain, low)
    last = max((Path(low.output) / "checkpoints").iterdir())
    wanted = state(last)
    assert any(":autoencoder." in name for name in wanted)
    shutil.rmtree(last)
    trainer = Trainer(low)
    assert trainer.resume()
    assert mx.isnan(flat_parameters(trainer.model)["autoencoder.encoder.conv_in.weight"]).all()
    assert_same(wanted, state(trainer.run()))


def test_a_student_its_teacher_and_previews(folders: dict[str, Path], make: Make) -> None:
    """The autoencoder comes back for previews, and goes again."""
    changes = {
        "adapter": None, "init": None, "sample": SampleConfig(("red square",), every=2),
        "consistency": ConsistencyConfig("ect", str(folders["janusflow"]), guidance=2.0, valid_pictures=2),
    }  # fmt: skip
    plain, low = (make("janusflow", "pairs", n, low_ram=n == "low", **changes) for n in ("plain", "low"))
    check_same_run(plain, low)
    sheets = sorted((Path(plain.output) / "samples").iterdir())
    assert [s.name for s in sheets] == ["step-00000000.png", "step-00000002.png"]
    assert all(s.read_bytes() == (Path(low.output) / "samples" / s.name).read_bytes() for s in sheets)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["adapter", "all weights"])
def test_weights_in_few_bits(
    adapter: AdapterTraining | None,
    folders: dict[str, Path],
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that was stored in 4 bits, and stays so, as on a GPU."""
    model = load(folders["janusflow"]).model
    nn.quantize(
        model, 32, 4, class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[-1] % 32 == 0
    )
    stored = save_model(tmp_path / "stored", model, folders["janusflow"])
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    changes = {"init": str(stored), "tokenizer": str(stored), "adapter": adapter, "steps": 1}
    check_same_run(*(make("janusflow", "pairs", n, low_ram=n == "low", **changes) for n in ("plain", "low")))


def test_nothing_is_used_while_it_is_out(folders: dict[str, Path], make: Make) -> None:
    """A pass through a module that is out gives no number; inside `complete` it gives the model's own."""
    trainer = Trainer(make("janusflow", "pairs", "out", low_ram=True))
    pixels = mx.random.uniform(shape=(1, *trainer.model.picture_size, 3), key=mx.random.key(1))
    assert mx.isnan(trainer.model.encode(pixels)).all()
    assert trainer.family is not None
    with trainer.family.complete():
        assert mx.array_equal(
            trainer.model.encode(pixels), load(folders["janusflow"]).pictures.encode(pixels)
        )  # type: ignore[attr-defined]
    assert mx.isnan(trainer.model.encode(pixels)).all()


# ---- memory ----


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """A model whose autoencoder is most of it."""
    folder = tmp_path_factory.mktemp("heavy")
    small = janusflow_tools.config()
    coder = dataclasses.replace(janusflow_tools.CODER, block_out_channels=(64, 256))
    model = JanusFlow(dataclasses.replace(small, autoencoder=coder))
    return save_model(folder / "model", model, folders["janusflow"])


def held(make_trainer: Callable[[], Trainer]) -> tuple[int, Trainer]:
    """Bytes that a trainer keeps in memory."""
    gc.collect()
    before = mx.get_active_memory()
    trainer = make_trainer()
    gc.collect()
    return mx.get_active_memory() - before, trainer


def test_the_modules_are_gone_from_memory(
    heavy: Path, folders: dict[str, Path], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("janusflow", "pairs", "out", init=str(heavy), tokenizer=str(heavy))
    plain, first = held(lambda: Trainer(config))
    flat = flat_parameters(first.model)
    idle = sum(v.nbytes for n, v in flat.items() if within(n, PARTS["janusflow"].idle(True, text=False)))
    rest = sum(v.nbytes for v in flat.values()) - idle
    assert idle > 3 * rest
    del first, flat
    seen: list[int] = []
    original = family_run.encoded

    def encoded(*arguments: Any) -> mx.array:
        out = original(*arguments)
        mx.eval(out)
        seen.append(mx.get_active_memory() - before)
        return out

    monkeypatch.setattr(family_run, "encoded", encoded)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    config = dataclasses.replace(config, low_ram=True)
    low, second = held(lambda: Trainer(config))
    peak = mx.get_peak_memory() - before
    found = estimate_family(config, second.model.config, tokens=32, text=False)
    assert found.encoding / peak == pytest.approx(1.0, abs=0.2)
    assert plain - low == pytest.approx(idle, rel=0.02)
    # While pictures are encoded only the encoder's half of the autoencoder is there, and none of the model.
    assert max(seen) < 0.6 * idle
    mx.reset_peak_memory()
    second.run()
    assert mx.get_peak_memory() - before < 0.8 * plain
    mx.eval(second.model.parameters())
    gc.collect()
    assert mx.get_active_memory() - before < 0.5 * plain


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_estimate_knows_it(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def plan_of(pictures: str, **changes: Any) -> Any:
        config = FinetuneConfig(str(folders[pictures]), str(folders[kind]), str(tmp_path / "out"), **changes)
        return make_plan(config, write=False)

    plain, low = plan_of("pairs"), plan_of("pairs", low_ram=True)
    flat = flat_parameters(load(folders[kind]).model)
    idle = sum(v.nbytes for n, v in flat.items() if within(n, PARTS[kind].idle(True, text=False)))
    assert plain.estimate.idle == plain.estimate.weights - low.estimate.weights == idle > 0
    assert "--low-ram" in suggestions(plain.estimate, plain.config)
    assert "--low-ram" not in suggestions(low.estimate, low.config)
    assert "--grad-checkpoint" not in suggestions(plain.estimate, plain.config)  # not there for these models
    encoder = sum(v.nbytes for n, v in flat.items() if within(n, ["autoencoder.encoder"]))
    assert low.estimate.encoding >= encoder
    with_text, full = plan_of("texts"), plan_of("texts", type="full")
    head = 0 if kind == "show_o2" else idle - with_text.estimate.idle  # there it is the embedding
    assert with_text.estimate.idle == full.estimate.idle == idle - head
    assert (head > 0) == (kind != "show_o2")
    assert low.report()["memory_gb"]["total"] <= plain.report()["memory_gb"]["total"]


# ---- what people see ----


def test_a_model_of_pixels_has_nothing_to_release(
    folders: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, cli: Any
) -> None:
    flags = ["--model", tiny_model_dir, "--data", folders["pairs"], "-o", tmp_path / "out", "--iters", 1]
    tuned = cli("finetune", *flags, "--low-ram")
    assert tuned.code == 0, tuned.err
    assert f"note: --low-ram: {NOTHING_IDLE}" in tuned.err


def test_the_verb(folders: dict[str, Path], tmp_path: Path, cli: Any) -> None:
    out, toml = tmp_path / "out", tmp_path / "f.toml"
    toml.write_text(f'low_ram = true\nmodel = "{folders["bagel"]}"\ndata = "{folders["pairs"]}"\niters = 1\n')
    tuned = cli("finetune", toml, "-o", out)
    assert tuned.code == 0, tuned.err
    assert "encoding all pictures" in tuned.err
    assert (out / "adapters.safetensors").is_file()


def test_bad_input(
    make: Make,
    folders: dict[str, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = tmp_path / "album"
    shutil.copytree(folders["pairs"], pictures)
    rows = SourceConfig(str(pictures / "train.jsonl"), str(pictures))
    data = DataConfig((rows,), caption_first=1.0, check_images=False, cache_gib=0.0)
    config = make("janusflow", "pairs", "out", data=data, valid_every=0, low_ram=True)

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(UserError, match=r"cannot keep the encoded pictures there \(No space left"):
            Trainer(config)
    with pytest.raises(UserError, match="low_ram is for converted models"):
        Trainer(dataclasses.replace(config, init=str(tiny_model_dir), tokenizer=str(tiny_model_dir)))
    (pictures / "blue.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"blue\.png"):
        Trainer(config)
