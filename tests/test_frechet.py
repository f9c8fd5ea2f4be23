"""Distances between sets, and `evaluate --frechet` with a feature extractor that needs no weights."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_evaluation import TRAIN, VAL, write_evaluation

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation import array_file, networks, painters
from mlx_transfusion.evaluation.array_file import ArrayFile, array_name
from mlx_transfusion.evaluation.config import load_config
from mlx_transfusion.evaluation.data import load_pairs
from mlx_transfusion.evaluation.distances import (
    Kernels,
    compare_sets,
    frechet,
    half_interval,
    half_ratio_interval,
    halves,
    kernel_distance,
)
from mlx_transfusion.evaluation.features import BATCH, extract
from mlx_transfusion.evaluation.set_distances import evaluate_distances
from mlx_transfusion.evaluation.table import distance_table
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer

seeds = st.integers(0, 10**6)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- Frechet distance ----


def with_moments(seed: int, rows: int, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Rows whose mean and (diagonal) covariance are exactly these."""
    x = normal(seed, rows, len(mean))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(rows - 1)
    return mean + x * deviation


def test_frechet_of_two_gaussians_in_closed_form() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 5.0]), np.array([0.5, 1.0, 3.0])
    a, b = np.array([1.0, 2.0, 0.5]), np.array([1.5, 0.2, 0.5])
    expected = 0.5**2 + 2**2 + (0.5**2 + 1.8**2)
    x, y = with_moments(0, 9, mean_a, a), with_moments(1, 30, mean_b, b)
    assert frechet(x, y) == pytest.approx(expected)
    assert frechet(y, x) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), seeds)
def test_frechet_with_fewer_and_more_rows_than_dimensions(n: int, m: int, d: int, seed: int) -> None:
    a, b = normal(seed, n, d) * 2, normal(seed + 1, m, d) + 0.3
    A, B = (np.cov(x, rowvar=False).reshape(d, d) for x in (a, b))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(A @ B).real, 0)).sum()  # eigenvalues of (A B)^(1/2)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * roots
    assert frechet(a, b) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 8), seeds)
def test_frechet_of_a_set_and_the_same_set_moved(n: int, d: int, seed: int) -> None:
    a, shift = normal(seed, n, d), normal(seed + 1, d)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + shift) == pytest.approx((shift**2).sum(), abs=1e-6)


# ---- kernel distance ----


def test_kernel_distance_by_hand() -> None:
    a, b = normal(0, 4, 3), normal(1, 5, 3)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def among(x: np.ndarray) -> float:
        return float(np.mean([k(p, q) for p, q in itertools.permutations(x, 2)]))

    between = np.mean([k(p, q) for p in a for q in b])
    assert kernel_distance(a, b) == pytest.approx(among(a) + among(b) - 2 * between)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_kernel_distance_is_unbiased(seed: int) -> None:
    # Over all ways to deal six points into two sets the mean is 0; the Frechet distance's is not.
    points = normal(seed, 6, 3)
    ways = [(list(c), [i for i in range(6) if i not in c]) for c in itertools.combinations(range(6), 2)]
    values = [kernel_distance(points[a], points[b]) for a, b in ways]
    assert np.mean(values) == pytest.approx(0, abs=1e-9 * max(map(abs, values)))
    assert min(values) < 0 < max(values)
    assert np.mean([frechet(points[a], points[b]) for a, b in ways]) > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 9), st.integers(4, 9), seeds)
def test_kernel_distance_of_parts(n: int, m: int, seed: int) -> None:
    a, b = normal(seed, n, 3), normal(seed + 1, m, 3)
    kernels = Kernels(a, b)
    assert kernels.distance() == pytest.approx(kernel_distance(a, b))
    for rows, columns in halves(n, m, 3, seed):
        assert kernels.distance(rows, columns) == pytest.approx(kernel_distance(a[rows], b[columns]))


@pytest.mark.parametrize("distance", [frechet, kernel_distance])
def test_one_picture_has_no_distance(distance: Callable[..., float]) -> None:
    with pytest.raises(UserError, match=r"two or more feature vectors in each set, got shape \[1, 3\]"):
        distance(np.zeros((5, 3)), np.zeros((1, 3)))


# ---- intervals ----


def test_halves_repeat_nothing_but_themselves() -> None:
    pairs = list(halves(9, 6, 20, seed=1))
    assert {(len(a), len(b)) for a, b in pairs} == {(4, 3)}
    assert all(len(set(a.tolist())) == 4 and len(set(b.tolist())) == 3 for a, b in pairs)
    assert len({tuple(sorted(a.tolist())) for a, _ in pairs}) > 10
    again = list(halves(9, 6, 20, seed=1))
    assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(pairs, again, strict=True))


def test_halves_give_the_interval_of_a_mean() -> None:
    x = normal(0, 400)
    means = np.array([x[rows].mean() for rows, _ in halves(400, 2, 2000, seed=0)])
    low, high = half_interval(x.mean(), means)
    spread = 1.96 * x.std() / np.sqrt(400)
    assert low == pytest.approx(x.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(x.mean() + spread, abs=0.1 * spread)


def test_intervals_hold_the_expected_figures() -> None:
    # 40 studies of two painters; the truth is the mean of 800 others.
    def study(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = normal(seed, 3, 60, 4)
        return 0.8 * z[0] + 0.5 * z[1] + 0.5, 0.8 * z[0] + 0.4, z[2]  # the bad one, the good one, reality

    def figures(seed: int) -> list[float]:
        bad, good, real = study(seed)
        over, under = frechet(bad, real), frechet(good, real)
        return [over, kernel_distance(bad, real), float(np.log(over / under))]

    others = np.array([figures(seed) for seed in range(1000, 1800)])
    truth, deviation = others.mean(0), others.std(0)
    held, width = [], []
    for seed in range(40):
        bad, good, real = study(seed)
        (figure, _), ratio = compare_sets([bad, good], real, seed, count=60)
        assert ratio is not None
        intervals = np.array(
            [
                figure["frechet"]["interval"],
                figure["kernel"]["interval"],
                np.log(ratio["frechet"]["interval"]),
            ]
        )
        held.append((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
        width.append((intervals[:, 1] - intervals[:, 0]) / (2 * 1.96 * deviation))
    assert (np.mean(held, axis=0) > 0.8).all()
    assert ((np.mean(width, axis=0) > 0.7) & (np.mean(width, axis=0) < 1.5)).all()  # no wider than need be


def test_ratio_of_a_set_to_itself_and_to_a_worse_one() -> None:
    real, good = normal(0, 40, 3), normal(1, 40, 3)
    bad = good * 1.5 + 2
    figures, ratio = compare_sets([bad, good], real, 0, count=50)
    assert ratio is not None
    assert ratio["frechet"]["value"] == pytest.approx(
        figures[0]["frechet"]["value"] / figures[1]["frechet"]["value"]
    )
    assert ratio["frechet"]["interval"][0] > 2
    _, same = compare_sets([bad, bad], real, 0, count=50)
    assert same is not None
    for name in ("frechet", "kernel"):
        assert same[name] == {"value": 1.0, "interval": [pytest.approx(1.0), pytest.approx(1.0)]}
    assert compare_sets([bad], real, 0, count=5)[1] is None


def test_a_ratio_to_nothing_is_none() -> None:
    halves_of = np.array([[1.0, 2.0], [1.1, 2.1]])
    assert half_ratio_interval(1.0, 2.0, halves_of) is not None
    assert half_ratio_interval(1.0, -0.1, halves_of) is None
    assert half_ratio_interval(1.0, 2.0, np.array([[1.0, -0.1], [1.0, 2.0]])) is None


# ---- the command ----


class Colors:
    """Mean and spread of each colour channel: features that cost nothing."""

    name, fingerprint = "Colors", "colors/1"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        x = pixels.reshape(len(pixels), -1, 3) / 255
        return np.concatenate([x.mean(1), x.std(1)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def other_model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    make_model: Callable[..., Transfusion],
) -> Path:
    return save_model(
        tmp_path_factory.mktemp("models") / "other", make_model(tiny_config, seed=3), tiny_tokenizer
    )


@pytest.fixture(scope="module")
def report(folder: Path, tiny_model_dir: Path, other_model_dir: Path) -> dict[str, Any]:
    return evaluate_distances(
        tiny_model_dir, folder / "evaluate.toml", folder / "sets.json", compare=other_model_dir,
        overrides=["compare.generation.steps=3"], extractor=Colors(),
    )  # fmt: skip


def test_report_of_two_models(
    report: dict[str, Any], folder: Path, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    assert json.loads((folder / "sets.json").read_text()) == report
    assert report["model"]["fingerprint"] == load(tiny_model_dir).fingerprint
    assert report["compared"]["fingerprint"] == load(other_model_dir).fingerprint
    assert report["settings"]["generation"]["sampler"] == "dpmpp_2m"
    assert report["settings"]["generation"]["steps"] == 2
    assert report["settings"]["compare"]["generation"]["steps"] == 3
    assert report["features"] == {"network": "Colors", "fingerprint": "colors/1"}
    assert "pairs/train.tar" in report["data_sha256"]
    for name, count in (("train", TRAIN), ("val", VAL)):
        split = report["distances"][name]
        assert split["count"] == split["references"] == count  # the counts of the config are larger
        for role in ("model", "compared"):
            for key in ("frechet", "kernel"):
                low, high = split[role][key]["interval"]
                assert low <= split[role][key]["value"] <= high
            assert 0 <= split[role]["retrieval"]["exact"]["rate"] <= 1
        assert split["ratio"]["frechet"]["value"] == pytest.approx(
            split["model"]["frechet"]["value"] / split["compared"]["frechet"]["value"]
        )
    floors = [report["distances"][name]["floor"] for name in ("train", "val")]
    assert [(f["count"], f["references"]) for f in floors] == [(TRAIN // 2, TRAIN // 2), (VAL, VAL)]
    text = distance_table(report)
    for number in (
        f"{report['distances']['val']['compared']['frechet']['value']:.3f}",
        f"{report['distances']['train']['ratio']['frechet']['value']:.3f}",
        f"{1000 * floors[1]['kernel']:.3f}",
        "floor: 6 train pictures, 6 real",
        "dpmpp_2m, 3 steps",
    ):
        assert number in text
    assert "FID" not in text


def test_a_painter_that_gives_the_references(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(folder / "evaluate.toml")
    c = load(tiny_model_dir).config
    pairs = load_pairs(config, config.train, c) + load_pairs(config, config.val, c)
    pixels = dict(zip(pairs.captions, pairs.pixels, strict=True))

    @dataclasses.dataclass
    class Made:
        pixels: np.ndarray

    def perfect(loaded: object, captions: list[str], *_: object) -> list[Made]:
        return [Made(pixels[caption]) for caption in captions]

    monkeypatch.setattr(painters, "generate_images", perfect)
    report = evaluate_distances(tiny_model_dir, folder / "evaluate.toml", extractor=Colors())
    assert "compared" not in report
    for split in report["distances"].values():
        assert split["model"]["frechet"]["value"] == pytest.approx(0, abs=1e-8)
        assert split["model"]["kernel"]["value"] < 0  # below its mean for two different sets of one kind
        assert split["model"]["retrieval"]["exact"]["rate"] == 1
        assert split["floor"]["frechet"] > 1e-5
        assert "ratio" not in split


def test_a_model_against_itself(folder: Path, tiny_model_dir: Path) -> None:
    report = evaluate_distances(
        tiny_model_dir, folder / "evaluate.toml", compare=tiny_model_dir, extractor=Colors(),
        overrides=["generation.steps=2", "compare.generation.steps=2", "compare.generation.batch_size=4",
                   "counts.frechet=5", "counts.references=7"],
    )  # fmt: skip
    train = report["distances"]["train"]
    assert (train["count"], train["references"]) == (5, 7)
    assert train["floor"]["count"] == 3
    assert train["ratio"]["frechet"] == {"value": 1, "interval": [1, 1]}  # same captions, seeds and halves
    assert train["model"] == train["compared"]


def test_what_is_kept_is_not_computed_again(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*overrides: str, extractor: Colors) -> dict[str, Any]:
        return evaluate_distances(
            tiny_model_dir, folder / "evaluate.toml", overrides=overrides, extractor=extractor,
            cache=tmp_path / "kept.npz",
        )  # fmt: skip

    first = run(extractor=Colors())
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"]

    class Silent(Colors):
        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            raise AssertionError("features computed again")

    real = painters.generate_images
    painted: list[int] = []

    def counted(loaded: Any, captions: Any, *rest: Any) -> Any:
        painted.append(len(captions))
        return real(loaded, captions, *rest)

    monkeypatch.setattr(painters, "generate_images", counted)
    again = run(extractor=Silent())
    assert {**again, "seconds": None} == {**first, "seconds": None}
    assert painted == []
    other = run("generation.guidance=2.0", extractor=Colors())
    assert painted == [TRAIN, VAL]
    assert other["distances"] != first["distances"]
    renamed = Silent()
    renamed.fingerprint = "colors/2"
    with pytest.raises(AssertionError, match="computed again"):
        run(extractor=renamed)


def test_an_interrupted_run_goes_on_where_it_stopped(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_file, "CHUNK", 5)
    real = painters.generate_images
    painted: list[int] = []
    limit = 2

    def interrupted(loaded: Any, captions: Any, *rest: Any) -> Any:
        if len(painted) == limit:
            raise KeyboardInterrupt
        painted.append(len(captions))
        return real(loaded, captions, *rest)

    def run(**more: Any) -> dict[str, Any]:
        return evaluate_distances(tiny_model_dir, folder / "evaluate.toml", extractor=Colors(), **more)

    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(painters, "generate_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cache=tmp_path / "kept.npz", progress=lambda *call: calls.append(call))
    assert painted == [5, 5]
    limit = 100
    made = run(cache=tmp_path / "kept.npz", progress=lambda *call: calls.append(call))
    assert painted == [5, 5, TRAIN - 10, 5, VAL - 5]
    assert [done for what, done, _ in calls if what == "features, train"] == [5, 10, 12]
    counts = [(done, total) for what, done, total in calls if what == "pictures, tiny, train"]
    assert counts == sorted(counts)
    assert counts[-1] == (2 * TRAIN, 2 * TRAIN)
    assert {**run(), "seconds": None} == {**made, "seconds": None}


def test_array_names_depend_on_everything() -> None:
    pixels = np.zeros((2, 2), np.uint8)
    names = {
        array_name("a", {}), array_name("b", {}), array_name("a", {"x": 1}), array_name("a", {}, pixels),
        array_name("a", {}, pixels + 1), array_name("a", {}, pixels.reshape(4)),
        array_name("a", {}, pixels.view(np.int8)),
    }  # fmt: skip
    assert len(names) == 7
    assert array_name("a", {"x": 1, "y": 2}) == array_name("a", {"y": 2, "x": 1})


def test_bad_array_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in"):
        ArrayFile(tmp_path / "kept.json")
    with pytest.raises(UserError, match="cannot be written"):
        ArrayFile(tmp_path / "none" / "kept.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    whole = (tmp_path / "objects.npz").read_bytes()
    for content in (b"", b"text", whole[:-30], whole):
        (tmp_path / "kept.npz").write_bytes(content)
        with pytest.raises(UserError, match="file of arrays, or damaged"):
            ArrayFile(tmp_path / "kept.npz")


def test_features_are_computed_in_batches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * BATCH + 3, 4, 4, 3), dtype=np.uint8)
    calls: list[tuple[int, int]] = []
    made = extract(Colors(), pixels, lambda done, total: calls.append((done, total)))
    np.testing.assert_array_equal(made, Colors()(pixels))
    assert calls == [(BATCH, len(pixels)), (2 * BATCH, len(pixels)), (len(pixels), len(pixels))]


def test_command_line(
    cli: Callable[..., Any],
    folder: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "default_extractor", Colors)
    common = ("evaluate", "--config", folder / "evaluate.toml", "--model", tiny_model_dir)
    result = cli(
        *common, "--frechet", "--quick", "--compare", tiny_model_dir, "--set", "compare.generation.steps=1",
        "--cache", tmp_path / "kept.npz", "--output", tmp_path / "report.json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "QUICK" in result.out
    assert "model / compared" in result.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["compare"]["generation"]["steps"] == 1
    assert report["distances"]["train"]["count"] == 8
    result = cli(*common, "--frechet", "--quick", "--json", "--cache", tmp_path / "kept.npz")
    assert json.loads(result.out)["distances"]["val"]["references"] == VAL
    for flag in ("--compare", "--cache"):
        result = cli(*common, flag, tmp_path / "kept.npz")
        assert result.code == 2
        assert "give --frechet too" in result.err


def test_command_line_without_the_weights(
    cli: Callable[..., Any], folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_transfusion.evaluation import features

    monkeypatch.setattr(features, "PACKAGE", "no_such_package")
    features.default_extractor.cache_clear()
    result = cli("evaluate", "--config", folder / "evaluate.toml", "--model", tiny_model_dir, "--frechet")
    assert result.code == 2
    assert result.err.startswith("error: the distances need the weights of EfficientNet-Lite0")


def test_models_of_two_sizes_and_splits_of_few_pictures(
    folder: Path,
    tiny_model_dir: Path,
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    make_model: Callable[..., Transfusion],
    tmp_path: Path,
) -> None:
    wide = dataclasses.replace(tiny_config, image_width=12)
    other = save_model(tmp_path / "wide", make_model(wide), tiny_tokenizer)
    with pytest.raises(UserError, match="model tiny paints 8 x 8 pixels and model wide 8 x 12"):
        evaluate_distances(tiny_model_dir, folder / "evaluate.toml", compare=other, extractor=Colors())
    few = write_evaluation(tmp_path)
    rows = few / "data/pairs/val.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="the val split has 3 pictures: distances need 4 or more"):
        evaluate_distances(tiny_model_dir, few / "evaluate.toml", extractor=Colors())


def test_a_setting_that_a_model_cannot_paint_with(folder: Path, tiny_model_dir: Path) -> None:
    assert GenerationSettings().sampler is None  # each model's own
    with pytest.raises(UserError, match="is a diffusion model, and the consistency sampler needs"):
        evaluate_distances(
            tiny_model_dir, folder / "evaluate.toml", extractor=Colors(), compare=tiny_model_dir,
            overrides=["compare.generation.sampler=consistency"],
        )  # fmt: skip
