"""The harness of examples/comparisons: a table end to end in tiny runs, resuming, intervals, power laws."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from autoencoder_tools import randomize
from PIL import Image
from tiny_evaluation import TOML, write_evaluation

from mlx_transfusion.autoencoder.folder import load_autoencoder, save_autoencoder
from mlx_transfusion.autoencoder.latents import write_cache
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig, QuantizerConfig
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.rows import Source, load_rows

FOLDER = Path(__file__).parent.parent / "examples" / "comparisons"
BASE = """
output = "unused"
tokenizer = "tokenizer.model"
batch_size = 4
sequence_length = 48
log_every = 1
save_every = 1
compile = false

[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16
image_height = 16
image_width = 16
patch_size = 8
time_frequencies = 4
max_position = 64

[[data.train]]
rows = "data/pairs/train.jsonl"
images = "data/pairs/train.tar"

[[data.train]]
rows = "data/texts/train.jsonl"
"""
TABLE = """
title = "Tiny"
measures = ["velocity", "frechet", "caption", "description"]
paper_columns = ["FID"]
serving = true
[[rows]]
variant = "many"
label = "16 patches"
paper = [1.5]
[[rows]]
variant = "few"
label = "4 patches"
against = "many"
paper = [2.5]
"""


class MeanColours:
    """Features that need no network."""

    name = "mean colours"
    fingerprint = "mean-colours"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1, 3).mean(1).astype(np.float32)


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    """The modules of the example."""
    names = (
        "plan_runs",
        "intervals",
        "measure_run",
        "power_laws",
        "run_tables",
        "draw_scaling",
        "draw_table",
        "draw_page",
    )
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def example(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A folder like the example's, with tiny data."""
    write_evaluation(tmp_path)
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "evaluate.toml").write_text(TOML + "\n")
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "comparisons.toml").write_text("budget_gflop = 0.005\nseeds = [0, 1]\n")
    for folder in ("variants", "tables"):
        (tmp_path / folder).mkdir()
    (tmp_path / "variants/few.toml").write_text("")
    (tmp_path / "variants/many.toml").write_text("[model]\npatch_size = 4\n")
    (tmp_path / "tables/tiny.toml").write_text(TABLE)
    return tmp_path


def test_a_table_end_to_end(tools: Any, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, results = example / "runs", example / "results"

    def run(*seeds: int) -> None:
        tools.run_tables.run_tables(
            ["tiny"], output, results, folder=example, seeds=seeds or None, extractor=MeanColours()
        )

    run(0)
    first = json.loads((results / "few-seed0.json").read_text())
    many = json.loads((results / "many-seed0.json").read_text())
    assert first["steps"] > many["steps"] >= 2, "fewer patches buy more steps"
    assert first["gflop"] == pytest.approx(many["gflop"], rel=0.3)
    assert first["set"] == [f"steps={first['steps']}", "seed=0"]
    assert many["set"] == ["model.patch_size=4", f"steps={many['steps']}", "seed=0"]
    assert set(first["measures"]) == set(tools.measure_run.MEASURES)
    for name in ("velocity", "picture", "caption", "description", "retrieval"):
        assert len(first["measures"][name]["values"]) == 5
    assert (results / "tiny-serving.json").exists()

    trained: list[str] = []
    train = tools.run_tables.train

    def counted(config: Any) -> Path:
        trained.append(config.output)
        return train(config)

    monkeypatch.setattr(tools.run_tables, "train", counted)
    run()
    assert [Path(t).name for t in trained] == ["many-seed1", "few-seed1"], "seed 0 was finished"
    run()
    assert len(trained) == 2
    assert json.loads((results / "few-seed0.json").read_text()) == first
    table = (results / "tiny.md").read_text()
    assert "| 16 patches | 1.5 |" in table
    assert "| 4 patches minus 16 patches |" in table
    assert "times as fast" in table
    with Image.open(results / "tiny.png") as picture:
        assert picture.size[0] > 600


def test_an_interrupted_run_goes_on(tools: Any, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained before the interruption is not trained again, and the result is the same."""
    plan, table = tools.plan_runs.read_plan(example), tools.plan_runs.read_table("tiny", example)
    assert [r.name for r in tools.plan_runs.runs_of(table, plan, example, example)] == [
        "many-seed0", "few-seed0", "many-seed1", "few-seed1",
    ]  # fmt: skip

    def finish(output: Path) -> dict[str, Any]:
        run = tools.plan_runs.plan_run("few", 0, plan, output, example)
        output.mkdir(exist_ok=True)
        tools.run_tables.finish(run, output, MeanColours(), example, output / "kept.npz")
        found: dict[str, Any] = json.loads((output / "few-seed0.json").read_text())
        return found

    whole = finish(example / "whole")
    measure = tools.run_tables.measure
    monkeypatch.setattr(tools.run_tables, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finish(example / "parts")
    assert not list((example / "parts").glob("*.json"))
    monkeypatch.setattr(tools.run_tables, "measure", measure)
    later = finish(example / "parts")
    assert later["measures"] == whole["measures"]
    assert later["seconds"]["train"] is None, "the time of a resumed run is not known"


def test_results_of_other_settings_are_refused(tools: Any, example: Path) -> None:
    plan = tools.plan_runs.read_plan(example)
    found = {"budget_gflop": plan.budget_gflop, "set": ["steps=7", "seed=0"]}
    tools.run_tables.write(example / "few-seed0.json", found)
    assert tools.run_tables.read_result("few", 0, plan, example, example) == found
    assert tools.run_tables.read_result("few", 1, plan, example, example) is None
    tools.run_tables.write(example / "few-seed0.json", found | {"budget_gflop": 7.0})
    with pytest.raises(
        UserError, match=r"was trained with budget_gflop=7\.0 steps=7 seed=0, and the files say"
    ):
        tools.run_tables.read_result("few", 0, plan, example, example)
    (example / "few-seed0.json").write_text("{")
    with pytest.raises(UserError, match="delete it and run again"):
        tools.run_tables.read_result("few", 0, plan, example, example)
    with pytest.raises(UserError, match='variant "none" is unknown'):
        tools.plan_runs.plan_run("none", 0, plan, example, example)
    with pytest.raises(UserError, match='table "none" is unknown, expected one of tiny'):
        tools.plan_runs.read_table("none", example)


def test_the_tables_of_the_example_are_whole(tools: Any) -> None:
    """Every variant is a valid config, and every `against` is a line of its table."""
    p = tools.plan_runs
    assert p.read_plan().budget_gflop > 0
    assert load_config(FOLDER / "evaluate.toml").counts.losses
    for name in p.table_names():
        table = p.read_table(name)
        variants = [row.variant for row in table.rows]
        assert all(row.against is None or row.against in variants for row in table.rows)
        assert all(len(row.paper) in (0, len(table.paper_columns)) for row in table.rows)
        assert set(table.measures) <= set(tools.measure_run.MEASURES)
        for variant in variants:
            found = p.read_variant(variant)
            load_train_config(found.base, list(found.sets))


def test_an_interval_of_one_number_a_run(tools: Any) -> None:
    found = tools.intervals.figure([{"value": v} for v in (1.0, 2.0, 6.0)])
    assert found.value == pytest.approx(3)
    assert (found.low, found.high) == (1, 6)
    alone = tools.intervals.figure([{"value": 2.0}])
    assert not alone.spread
    assert found.spread


def test_weights_and_differences(tools: Any) -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.normal(3, 1, (3, 80)), rng.integers(1, 9, (3, 80))
    runs = [{"values": v.tolist(), "weights": w.tolist()} for v, w in zip(values, weights, strict=True)]
    found = tools.intervals.figure(runs)
    assert found.value == pytest.approx((values * weights).sum() / weights.sum())
    assert found.low < found.value < found.high
    higher = [r | {"values": [v + 0.05 for v in r["values"]]} for r in runs]
    change = tools.intervals.difference(higher, runs)
    assert change.value == pytest.approx(0.05)
    assert change.high - change.low < 1e-9, "both have the same items, seeds and weights in every sample"
    assert found.high - found.low > 0.2


def test_power_laws(tools: Any) -> None:
    laws = tools.power_laws
    x = [1.0, 3.0, 10.0, 30.0]
    law = laws.fit(x, [5 * v**-0.25 for v in x])
    assert (law.factor, law.exponent, law.r_squared) == pytest.approx((5, -0.25, 1))
    assert law.inverse(law.at(7.0)) == pytest.approx(7)
    # Theirs at 30 is 4 * 30 ** -0.2; ours gets there at a tenth of that budget by construction.
    theirs = (x, [4 * v**-0.2 for v in x])
    at_parity = 4 * 30**-0.2
    ours = (x, [at_parity * (v / 3) ** -0.5 for v in x])
    assert laws.parity_ratio(ours, theirs) == pytest.approx(0.1)
    assert laws.parity_ratio(theirs, theirs) == pytest.approx(1)
    low, high = laws.parity_interval(ours, theirs)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1), "points without scatter have no spread"
    rng = np.random.default_rng(1)
    scattered = (x, [y * rng.lognormal(0, 0.05) for y in ours[1]])
    low, high = laws.parity_interval(scattered, theirs)
    assert low < laws.parity_ratio(scattered, theirs) < high
    flat = (x, [2.0 * v**-1e-4 for v in x])
    rising = (x, [2.0 * v**0.1 for v in x])
    for never in (flat, rising):  # no budget is enough, also where the number would be too large for a float
        assert laws.parity_ratio(never, (x, [0.5] * len(x))) == math.inf
        assert laws.parity_interval(never, (x, [0.5] * len(x)))[1] == math.inf
    with pytest.raises(UserError, match="two or more different budgets"):
        laws.fit([2.0, 2.0], [1.0, 1.1])
    with pytest.raises(UserError, match="no inverse"):
        laws.fit([1.0, 2.0], [3.0, 3.0]).inverse(2.0)


def test_a_table_of_two_families(tools: Any, tmp_path: Path) -> None:
    """Exponents and ratio of power laws that are known, the paper's beside them, and the curves."""
    rows = tuple(
        tools.plan_runs.Row(f"{family}-{size}", f"{family} {size}", family=family)
        for family in ("ours", "theirs")
        for size in (1, 2, 3)
    )
    table = tools.plan_runs.Table("Scaling", rows, ("frechet", "text"), paper_ratios=(0.029, float("nan")))
    results = {}
    for row in rows:
        budget = 10.0 ** int(row.variant[-1])
        ours = row.family == "ours"
        distance = 300 * (budget / 100) ** -0.5 if ours else 300 * (budget / 1000) ** -0.25
        measures = {"frechet": {"value": distance}, "text": {"value": 5 - 0.1 * np.log(budget)}}
        seconds = {"train": 60.0, "measure": 6.0}
        results[row.variant] = [
            {"seed": 0, "gflop": budget, "steps": 1, "seconds": seconds, "measures": measures}
        ]
    text = tools.draw_table.markdown(table, results) + tools.draw_scaling.parity(table, results)
    assert "| Frechet distance | 0.029 | -0.500 | -0.250 | 1.00, 1.00 | 0.1 | [0.1, 0.1] |" in text
    assert "| perplexity, glosses |  | -0.100 | -0.100 | 1.00, 1.00 | 1 | [1, 1] |" in text
    assert text.count("theirs 1 ") == 1
    assert tools.draw_scaling.picture(table, results).size[0] > 400


def test_the_page_holds_what_the_results_say(tools: Any, tmp_path: Path) -> None:
    """Its tables are those that the command of the README writes; nothing in them is typed."""
    results = tmp_path / "results"
    shutil.copytree(FOLDER / "results", results)
    page = shutil.copy(FOLDER.parent.parent / "docs" / "comparisons.md", tmp_path / "page.md")
    before = page.read_text()
    tables = {name: tools.plan_runs.read_table(name) for name in tools.plan_runs.table_names()}
    tools.run_tables.draw(tables, tools.plan_runs.read_plan(), results, page=page)
    assert page.read_text() == before
    for file in (FOLDER / "results").glob("*.md"):
        assert (results / file.name).read_text() == file.read_text()


def test_a_page_is_filled(tools: Any, tmp_path: Path) -> None:
    """Lines, and below them their differences from the line they are compared with, the paper's too."""
    rows = (
        tools.plan_runs.Row("a", "A", paper=(2.0,)),
        tools.plan_runs.Row("b", "B", against="a", paper=(3.5,)),
    )
    table = tools.plan_runs.Table("Tiny", rows, ("kernel", "text"), paper_columns=("FID",))
    measured = {"a": (0.1, [1.0, 2.0]), "b": (1.3456, [2.0, 3.0])}
    results = {
        name: [{"seed": 0, "steps": 7, "seconds": {"train": None},
                "measures": {"kernel": {"value": k}, "text": {"values": v}}}]
        for name, (k, v) in measured.items()
    }  # fmt: skip
    lines = tools.draw_table.short_markdown(table, results)
    assert lines.splitlines()[2:] == [
        "| A | 2 | 100 | 1.5 | 1 | 7 |",
        "| B | 3.5 | 1346 | 2.5 | 1 | 7 |",
        "| B minus A | +1.5 | +1246 | +1 |  |  |",
    ]
    again = {
        name: [*runs, {**runs[0], "seed": 1}, {**runs[0], "seed": 2, "measures": {
            "kernel": {"value": runs[0]["measures"]["kernel"]["value"] * 2},
            "text": {"values": [4 * v for v in runs[0]["measures"]["text"]["values"]]}}}]
        for name, runs in results.items()
    }  # fmt: skip
    change = tools.draw_table.short_markdown(table, again).splitlines()[-1].split(" | ")
    assert change[2] == "+1661 [1246, 2491]", "one number a run: three seeds are no proof"
    assert change[3] == "**+2 [1, 4]**"
    page = tmp_path / "page.md"
    page.write_text("Above\n<!-- table tiny -->\nold\n<!-- end of tiny -->\nBelow\n")
    for _ in range(2):
        tools.draw_page.fill(page, {"tiny": lines})
        assert page.read_text() == f"Above\n<!-- table tiny -->\n{lines}<!-- end of tiny -->\nBelow\n"
    with pytest.raises(UserError, match="has no place for table other"):
        tools.draw_page.fill(page, {"tiny": "new\n", "other": lines})
    assert "new" not in page.read_text()


def test_a_model_of_codes_is_measured(tools: Any, example: Path) -> None:
    """A variant with a base of its own; what only a diffusion model has is left out."""
    model = AutoencoderVQ(
        AutoencoderConfig(
            block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=16,
            quantizer=QuantizerConfig(8),
        )
    )  # fmt: skip
    randomize(model)
    save_autoencoder(example / "vq", model)
    source = Source(example / "data/pairs/train.jsonl", example / "data/pairs/train.tar")
    refs = [s for row in load_rows(source).rows for s in row.segments if not isinstance(s, str)]
    write_cache(example / "codes.safetensors", load_autoencoder(example / "vq"), refs, (16, 16))
    text = BASE.replace("[model]", '[model]\nmodel_type = "discrete"\ncodebook_size = 8')
    text = text.replace("patch_size = 8\ntime_frequencies = 4\n", "")
    text = text.replace("image_height = 16\nimage_width = 16", "image_height = 4\nimage_width = 4")
    latents = '[data]\nlatents = ["codes.safetensors"]\nautoencoder = "vq"\n\n[[data.train]]'
    (example / "discrete.toml").write_text(text.replace("[[data.train]]", latents, 1))
    (example / "variants/codes.toml").write_text('base = "discrete.toml"\nbudget_gflop = 0.002\n')
    run = tools.plan_runs.plan_run("codes", 0, tools.plan_runs.read_plan(example), example / "runs", example)
    assert run.gflop == pytest.approx(0.002, rel=0.5)
    tools.run_tables.finish(run, example, MeanColours(), example, example / "kept.npz")
    measures = json.loads((example / "codes-seed0.json").read_text())["measures"]
    assert set(measures) == set(tools.measure_run.MEASURES) - {"velocity", "picture"}
    assert len(measures["caption"]["values"]) == 5
