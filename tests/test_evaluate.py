import dataclasses
import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tiny_evaluation import CAPTIONS, TOML, TRAIN, VAL, write_evaluation

from mlx_transfusion import trigflow
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation import measures
from mlx_transfusion.evaluation.config import DATA_VARIABLE, QUICK, load_config
from mlx_transfusion.evaluation.data import choose, load_pairs
from mlx_transfusion.evaluation.denoising import BUCKET_EDGES, denoising_errors
from mlx_transfusion.evaluation.describing import describe_pictures
from mlx_transfusion.evaluation.report import QUICK_STEPS, evaluate, settings_for
from mlx_transfusion.evaluation.statistics import bootstrap_interval
from mlx_transfusion.evaluation.table import table
from mlx_transfusion.generation import Finished, Token, complete, describe, generate_images
from mlx_transfusion.images import read_record
from mlx_transfusion.model_io import Loaded, load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def tiny_loaded(tiny_model_dir: Path) -> Loaded:
    return load(tiny_model_dir)


@pytest.fixture(scope="module")
def report(folder: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return evaluate(tiny_model_dir, folder / "evaluate.toml", folder / "report.json")


# ---- the whole ----


def test_report_has_every_figure_and_is_written(
    report: dict[str, Any], folder: Path, tiny_loaded: Loaded
) -> None:
    assert json.loads((folder / "report.json").read_text()) == report
    assert {p.name for p in folder.iterdir()} == {"evaluate.toml", "data", "report.json"}  # nothing left over
    for split, references in (("train", TRAIN), ("val", TRAIN + VAL)):
        pictures, descriptions = report["pictures"][split], report["descriptions"][split]
        assert pictures["count"] == descriptions["count"] == len(pictures["items"]) == 5
        assert pictures["references"] == descriptions["references"] == references
        assert pictures["exact"]["chance"] == pytest.approx(1 / references)
        assert pictures["exact"]["rate"] == np.mean([item["exact"] for item in pictures["items"]])
        assert descriptions["right"]["rate"] == np.mean([item["right"] for item in descriptions["items"]])
        low, high = pictures["variant"]["interval"]
        assert low <= pictures["variant"]["rate"] <= high
        losses = report["losses"][split]
        assert losses["caption_before_picture"]["tokens"] == losses["caption_after_picture"]["tokens"]
        assert len(losses["denoising"]["with_caption"]["velocity_error"]) == len(BUCKET_EDGES) - 1
    assert report["text"]["model"]["tokens"] == report["text"]["bigram"]["tokens"]
    assert report["text"]["bigram"]["perplexity"] < report["text"]["unigram"]["perplexity"]
    assert report["text"]["training_texts"] == len(CAPTIONS) ** 2 - 20
    assert report["settings"]["generation"]["steps"] == 2
    assert report["model"]["fingerprint"] == tiny_loaded.fingerprint


def test_figures_repeat(report: dict[str, Any], folder: Path, tiny_model_dir: Path) -> None:
    again = evaluate(tiny_model_dir, folder / "evaluate.toml")
    assert {**again, "seconds": None} == {**report, "seconds": None}


def test_table_shows_the_figures(report: dict[str, Any]) -> None:
    text = table(report)
    for number in (
        f"{report['pictures']['train']['variant']['rate']:.1%}",
        f"{report['text']['bigram']['perplexity']:.2f}",
        f"{report['losses']['val']['denoising']['without_caption']['picture_error_at_noise']:.4f}",
        report["model"]["fingerprint"],
    ):
        assert number in text
    assert "QUICK" not in text


def test_quick_takes_small_counts_and_says_so_and_progress_reaches_its_end(
    folder: Path, tiny_model_dir: Path
) -> None:
    config = load_config(folder / "evaluate.toml")
    large = dataclasses.replace(config, counts=dataclasses.replace(config.counts, pictures=200, texts=10**6))
    assert large.quick().counts.pictures == QUICK.pictures
    assert large.quick().counts.texts == QUICK.texts
    assert large.quick().counts.losses == 5  # never more than the config asks for
    calls: list[tuple[str, int, int]] = []
    report = evaluate(
        tiny_model_dir, folder / "evaluate.toml", quick=True, progress=lambda *call: calls.append(call)
    )
    assert "QUICK" in table(report)
    assert report["settings"]["generation"]["steps"] == 2
    painting = [done for what, done, total in calls if what == "pictures, val" and total == 5 * 2]
    assert painting == sorted(painting)
    assert painting[-1] == 10
    assert calls[-1] == ("text", 1, 1)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_generator_that_gives_the_references_is_always_right(
    name: str, folder: Path, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(folder / "evaluate.toml")
    train = load_pairs(config, config.train, tiny_loaded.config)
    val = load_pairs(config, config.val, tiny_loaded.config)
    pixels = dict(zip(train.captions + val.captions, [*train.pixels, *val.pixels], strict=True))

    @dataclasses.dataclass
    class Made:
        pixels: np.ndarray

    def perfect(_: Loaded, captions: list[str], *__: object) -> list[Made]:
        return [Made(pixels[caption]) for caption in captions]

    def constant(_: Loaded, captions: list[str], *__: object) -> list[Made]:
        return [Made(train.pixels[3]) for _ in captions]

    split = {
        "train": measures.Split("train", train, train, 0),
        "val": measures.Split("val", val, train + val, TRAIN),
    }[name]
    every = dataclasses.replace(config, counts=dataclasses.replace(config.counts, pictures=100))
    monkeypatch.setattr(measures, "generate_images", perfect)
    result = measures.measure_pictures(tiny_loaded, every, split, lambda done, total: None)
    assert result["count"] == len(split.pairs)
    assert result["exact"]["rate"] == 1
    assert result["mean_rank"] == 1
    assert result["mean_cosine"] == pytest.approx(1)
    monkeypatch.setattr(measures, "generate_images", constant)
    result = measures.measure_pictures(tiny_loaded, every, split, lambda done, total: None)
    assert result["exact"]["rate"] == (1 / TRAIN if name == "train" else 0)


# ---- descriptions ----


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_batched_descriptions_are_those_of_describe(tiny_loaded: Loaded) -> None:
    made = pictures(7)
    settings = dataclasses.replace(DEFAULTS, max_tokens=6)
    single = [describe(tiny_loaded, picture, settings=settings) for picture in made]
    assert len(set(single)) > 1  # the picture is looked at
    for batch_size in (1, 3, 7):
        assert describe_pictures(tiny_loaded, made, max_tokens=6, batch_size=batch_size) == single


def test_rows_that_end_early_leave_the_others_alone(
    tiny_loaded: Loaded, tiny_tokenizer: Tokenizer, make_model: Callable[..., Transfusion], tmp_path: Path
) -> None:
    made = pictures(12, seed=1)
    settings = dataclasses.replace(DEFAULTS, max_tokens=12, max_images=0)
    written = [events(tiny_loaded, picture, settings)[0] for picture in made]
    often = Counter(token for ids in written for token in set(ids)).most_common(1)[0][0]
    model = make_model(tiny_loaded.config)
    weight = np.array(model.lm_head.weight)
    weight[tiny_loaded.config.eos_token_id] = 1.01 * weight[often]  # EOS wherever that token stood
    model.lm_head.weight = mx.array(weight)
    loaded = load(save_model(tmp_path / "model", model, tiny_tokenizer))
    assert {events(loaded, picture, settings)[1] for picture in made} == {"stop", "length"}
    single = [describe(loaded, picture, settings=settings) for picture in made]
    assert describe_pictures(loaded, made, max_tokens=12) == single


def events(loaded: Loaded, picture: np.ndarray, settings: GenerationSettings) -> tuple[list[int], str]:
    """Ids of a description one by one, and why it ended."""
    *tokens, end = complete(loaded, [picture], settings=settings)
    assert isinstance(end, Finished)
    return [i for token in tokens if isinstance(token, Token) for i in token.ids], end.reason


def test_ids_beyond_the_tokenizer_are_never_written(
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    make_model: Callable[..., Transfusion],
    tmp_path: Path,
) -> None:
    padded = dataclasses.replace(tiny_config, vocab_size=tiny_config.vocab_size + 512)
    loaded = load(save_model(tmp_path / "model", make_model(padded), tiny_tokenizer))
    made = pictures(4)
    settings = dataclasses.replace(DEFAULTS, max_tokens=4)
    single = [describe(loaded, picture, settings=settings) for picture in made]
    assert describe_pictures(loaded, made, max_tokens=4) == single


# ---- denoising ----


def patches(config: ModelConfig, count: int) -> np.ndarray:
    shape = (count, config.patches_per_image, config.patch_dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_model_that_predicts_nothing_errs_by_the_whole_velocity(tiny_config: ModelConfig) -> None:
    model = Transfusion(tiny_config)  # its patch decoder starts at zero
    x0 = patches(tiny_config, 6)
    velocity, picture = denoising_errors(model, [[1, 4]] * 6, x0)
    np.testing.assert_allclose(velocity[:, -1], (x0**2).mean((1, 2)), rtol=1e-4)  # v = -x0 at pi/2
    np.testing.assert_allclose(velocity[:, -1], picture[:, -1])
    assert np.allclose(velocity.mean(0), 1, atol=0.2)  # cos^2 + sin^2, for noise and data of variance 1
    assert (picture[:, 0] < math.sin(BUCKET_EDGES[1]) ** 2 * velocity[:, 0]).all()


def test_a_perfect_model_has_no_error(tiny_config: ModelConfig) -> None:
    x0 = patches(tiny_config, 3)

    class Oracle(Transfusion):
        def velocity(self, x: mx.array, angle: mx.array, cache: object) -> mx.array:
            return trigflow.velocity_from_x0(x, mx.array(x0), trigflow.per_image(angle, x))

    velocity, _ = denoising_errors(Oracle(tiny_config), [[1, 4]] * 3, x0)
    assert velocity[:, 1:].max() < 1e-6


def test_denoising_depends_on_caption_but_not_on_batch(any_model: Transfusion) -> None:
    x0 = patches(any_model.config, 7)
    prefixes = [[1, *range(6, 6 + i), 4] for i in range(7)]
    whole, _ = denoising_errors(any_model, prefixes, x0)
    parts, _ = denoising_errors(any_model, prefixes, x0, batch_size=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
    bare, _ = denoising_errors(any_model, [[1, 4]] * 7, x0)
    assert bare[0] == pytest.approx(whole[0], rel=1e-3)  # its prefix is the same
    assert not np.allclose(bare[1:], whole[1:], rtol=1e-2)


# ---- statistics and choice ----


def test_interval_of_a_rate() -> None:
    values = np.array([1.0] * 120 + [0.0] * 80)
    low, high = bootstrap_interval(values)
    spread = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert low == pytest.approx(0.6 - spread, abs=0.01)
    assert high == pytest.approx(0.6 + spread, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval(np.ones(5)) == (1, 1)


def test_interval_of_a_ratio_weighs_by_its_denominator() -> None:
    assert bootstrap_interval(np.array([2.0, 20.0]), np.array([1, 10])) == (2, 2)


def test_choice_is_seeded_and_takes_what_there_is() -> None:
    first = choose(100, 10, 0, "pictures")
    assert len(set(first.tolist())) == 10
    assert first.tolist() == choose(100, 10, 0, "pictures").tolist()
    assert first.tolist() != choose(100, 10, 1, "pictures").tolist()
    assert first.tolist() != choose(100, 10, 0, "descriptions").tolist()
    assert choose(4, 10, 0, "pictures").tolist() == [0, 1, 2, 3]


# ---- bad input ----


def broken(folder: Path, tmp_path: Path, old: str, new: str) -> Path:
    assert old in TOML
    file = tmp_path / "evaluate.toml"
    file.write_text(TOML.replace('"data"', json.dumps(str(folder / "data"))).replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("description_tokens", "description_token", "did you mean .description_tokens"),
        ("texts = 8", 'texts = "8"', "counts: texts: expected int"),
        ("texts = 8", "texts = 0", "counts.texts is 0"),
        ("steps = 2", 'sampler = "ddmp"', "unknown sampler 'ddmp'"),
        ("steps = 2", "steps = 2\nguidance = -1.0", "guidance is -1"),
        ("[train]", "[train", "not valid TOML"),
        ('"pairs/val.jsonl"', '"pairs/none.jsonl"', "none.jsonl: no such file"),
        ('"texts/val.jsonl"', '"pairs/val.jsonl"', 'expected ."text". rows'),
        ('"pairs/val.jsonl"', '"texts/val.jsonl"', 'expected ."image", "text". rows'),
    ],
)  # fmt: skip
def test_bad_config(
    old: str, new: str, message: str, folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate(tiny_model_dir, broken(folder, tmp_path, old, new))
    assert "\n" not in str(error.value)


def test_missing_config_and_output_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the evaluation config"):
        evaluate("unused", tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot write the report"):
        evaluate("unused", folder / "evaluate.toml", tmp_path / "none" / "report.json")
    with pytest.raises(UserError, match="is a folder"):
        evaluate("unused", folder / "evaluate.toml", tmp_path)


def test_data_folder_by_argument_variable_and_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert load_config(folder / "evaluate.toml").data == str(folder / "data")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert load_config(folder / "evaluate.toml").data == str(tmp_path)
    assert load_config(folder / "evaluate.toml", folder).data == str(folder)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=DATA_VARIABLE):
        load_config(folder / "evaluate.toml")


def test_overrides_change_the_toml(folder: Path, tiny_model_dir: Path) -> None:
    config = load_config(
        folder / "evaluate.toml", overrides=["generation.guidance=1.5", "counts.frechet=3", "compare.model=x"]
    )
    assert config.generation.guidance == 1.5
    assert config.counts.frechet == 3
    assert config.compare.model == "x"
    with pytest.raises(UserError, match="counts: unknown key"):
        load_config(folder / "evaluate.toml", overrides=["counts.nothing=3"])
    with pytest.raises(UserError, match="unknown sampler 'none'"):
        evaluate(tiny_model_dir, folder / "evaluate.toml", overrides=["generation.sampler=none"])


def test_the_compared_model_may_lie_beside_the_toml(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    file = broken(folder, tmp_path, "[generation]", '[compare]\nmodel = "other"\n[generation]')
    assert load_config(file).compare.model == str(tmp_path / "other")


@pytest.mark.parametrize(("steps", "used"), [(30, QUICK_STEPS), (3, 3)])
def test_quick_takes_few_steps(steps: int, used: int, tiny_loaded: Loaded) -> None:
    settings = GenerationSettings(steps=steps)
    assert settings_for(tiny_loaded, settings, quick=True).steps == used
    assert settings_for(tiny_loaded, settings, quick=False).steps == steps


# ---- the examples ----

EXAMPLES = Path(__file__).parent.parent / "examples" / "emoji"


def contact_sheet() -> ModuleType:
    return script("contact_sheet")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contact_sheet(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = contact_sheet()
    output, strip = tmp_path / "sheet.png", tmp_path / "strip.png"
    arguments = [
        "contact_sheet.py", "--model", str(tiny_model_dir), "--config", str(folder / "evaluate.toml"),
        "--count", "5", "--columns", "3", "--output", str(output), "--strip", str(strip),
        "--strip-count", "2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    record = read_record(output)
    assert len(set(record["captions"])) == 5
    assert set(record["captions"]) <= set(CAPTIONS[:TRAIN])
    assert [CAPTIONS[seed] for seed in record["seeds"]] == record["captions"]
    with Image.open(output) as image:
        assert image.width == 3 * (module.PICTURE + 2 * module.MARGIN)
        sheet = np.asarray(image)
    with Image.open(strip) as image:
        both = np.asarray(image)
    m, p = module.MARGIN, module.PICTURE
    first = sheet[m : m + p, m : m + p]
    np.testing.assert_array_equal(both[m + p + m : m + p + m + p, m : m + p], first)  # painted, beneath
    config = load_config(folder / "evaluate.toml")
    train = load_pairs(config, config.train, load(tiny_model_dir).config)
    reference = np.asarray(module.enlarged(train.pixels[record["seeds"][0]]))
    np.testing.assert_array_equal(both[m : m + p, m : m + p], reference)  # reference, above
    beneath = sheet[m + p + 2 : 2 * m + p + 30, :p]
    assert beneath.min() < 120  # the caption


def test_teacher_and_student_side_by_side(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = script("side_by_side")
    teacher = load(tiny_model_dir)
    objective = {"objective": {"name": "consistency", "method": "scd", "guidance": 3.0}}
    student = save_model(tmp_path / "student", teacher.model, teacher.tokenizer, objective)
    output = tmp_path / "rows.png"
    arguments = [
        "side_by_side.py", "--teacher", str(tiny_model_dir), "--student", str(student),
        "--config", str(folder / "evaluate.toml"), "--count", "3", "--output", str(output),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    record = read_record(output)
    assert [CAPTIONS[seed] for seed in record["seeds"]] == record["captions"]
    ways = [f"{role}, {what}" for role, rows in module.WAYS.items() for what, _ in rows]
    assert list(record["seconds"]) == ways
    assert all(seconds > 0 for seconds in record["seconds"].values())
    m, p = module.MARGIN, module.PICTURE
    with Image.open(output) as image:
        assert image.width == module.LABEL + 3 * (p + 2 * m)
        sheet = np.asarray(image)
    settings = module.WAYS["student"][1][1]
    first = generate_images(load(student), record["captions"][0], record["seeds"][0], settings)[0].pixels
    row = len(ways) - 1
    top, left = row * (p + 2 * m) + m, module.LABEL + m
    np.testing.assert_array_equal(sheet[top : top + p, left : left + p], np.asarray(module.enlarged(first)))


def test_caption_text_that_the_font_can_show() -> None:
    module = contact_sheet()
    assert module.plain("flag: Réunion ’n “x”") == 'flag: Reunion \'n "x"'


def test_the_emoji_config_is_valid(tmp_path: Path) -> None:
    config = load_config(EXAMPLES / "evaluate.toml", tmp_path)
    assert config.counts.pictures == 200
    assert config.counts.descriptions == 200


def test_the_table_of_errors_by_angle(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    teacher = load(tiny_model_dir)
    student = save_model(tmp_path / "student", teacher.model, teacher.tokenizer)
    flags = ["--config", str(folder / "evaluate.toml"), "--count", "3", "--guidance", "1"]
    monkeypatch.setattr(sys, "argv", ["flow_map.py", str(tiny_model_dir), str(student), *flags])
    script("flow_map").main()
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1:] for row in rows[1:]] == [rows[0][1:]]  # the same weights
    assert len(head) == len(rows[0])
    assert 0 < float(rows[0][1]) < float(rows[0][3])
