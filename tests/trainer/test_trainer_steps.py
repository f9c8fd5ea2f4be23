"""What a training step computes: losses, gradients in every way, clipping, the same bits in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tiny_training import (
    MUON,
    Arrays,
    MakeConfig,
    assert_close,
    assert_same,
    metrics,
    state,
)

from mlx_transfusion import blas, lanes, losses
from mlx_transfusion.model_io import load
from mlx_transfusion.training.step import to_arrays
from mlx_transfusion.training.trainer import Trainer, train


def test_it_learns(config: MakeConfig) -> None:
    run = config(
        "steps=60",
        "optimizer.warmup=5",
        "optimizer.learning_rate=1e-2",
        "model.patch_skip=true",
        "save_every=1000",
    )
    last = train(run)
    assert last.name == "step-00000060"
    rows = metrics(Path(run.output))
    assert [r["step"] for r in rows] == list(range(1, 61))
    for name, factor in (("text_loss", 0.5), ("image_loss", 0.75)):
        first, final = (np.mean([r[name] for r in part]) for part in (rows[:3], rows[-10:]))
        assert final < factor * first, name
    for r in rows:
        assert r["loss"] == pytest.approx(r["text_loss"] + 5 * r["image_loss"])
        assert r["tokens_per_second"] > 0
        assert r["peak_memory_gb"] > 0
        assert 0 <= r["data_wait"] < 1
        assert r["gradient_norm"] > 0
    assert rows[0]["text_loss"] == pytest.approx(np.log(288), rel=0.15)  # a fresh model knows nothing
    assert rows[0]["image_loss"] == pytest.approx(1.0, rel=0.5)
    assert load(last).config.patch_skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["dtype=bfloat16"],
        ["gradient_checkpointing=true"],
        ["compile=false"],
        ["model.prediction=epsilon", "diffusion.distribution=tan_lognormal", "data.flip=0.5"],
        ["optimizer.clip=0", "model.num_key_value_heads=2", "model.qk_norm=true"],
    ],
    ids=lambda o: o[0],
)
def test_options_run(config: MakeConfig, overrides: list[str]) -> None:
    run = config("steps=2", *overrides)
    last = train(run)
    assert all(v.dtype == np.float32 for k, v in state(last).items() if k.startswith(("train", "model")))
    assert all(np.isfinite(r["loss"]) for r in metrics(Path(run.output)))


def gradients_of(trainer: Trainer, step: int = 0) -> tuple[Arrays, np.ndarray]:
    """Summed gradients and losses of all parts of a step."""
    loaded = trainer._load(step)
    total: Any = None
    sums = np.zeros(2)
    for part in loaded.parts:
        gradients, part_sums = trainer.step.gradients(
            trainer.state.weights, part, loaded.text_total, loaded.image_total, step
        )
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        sums += np.array(part_sums)
    return {k: np.array(v) for k, v in tree_flatten(total)}, sums


def test_ways_to_compute_the_same_gradients(config: MakeConfig) -> None:
    """Compiled or not, checkpointed or not; bfloat16 is near. Fresh patch decoders are moved off zero first."""
    wanted: Arrays = {}
    for overrides, tolerance in (([], 0), (["compile=false"], 1e-5), (["gradient_checkpointing=true"], 1e-5),
                                 (["dtype=bfloat16"], 0.1)):  # fmt: skip
        trainer = Trainer(config(*overrides))
        moved = tree_map(
            lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(1)), trainer.state.weights
        )
        trainer.state.weights = moved
        gradients, _ = gradients_of(trainer)
        wanted = wanted or gradients
        assert_close(wanted, gradients, tolerance)
        assert all(np.abs(g).max() > 0 for g in gradients.values())


@pytest.mark.parametrize("option", ["compile=true", "compile=false", "gradient_checkpointing=true"])
def test_gradients_in_lanes_are_the_same(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Rows shared out between three cores, compiled or not."""
    monkeypatch.setattr(blas, "threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", lambda count: None)
    monkeypatch.setattr(lanes, "MIN_TOKENS", 1)

    def gradients(rows: int) -> tuple[dict[str, np.ndarray], list[float]]:
        trainer = Trainer(config(option))
        loaded = trainer._load(0)
        with lanes.lanes(rows):
            found, sums = trainer.step.gradients(
                trainer.state.weights, loaded.parts[0], loaded.text_total, loaded.image_total, 0
            )
            mx.eval(found, sums)
        return {name: np.array(value) for name, value in tree_flatten(found)}, sums.tolist()

    wanted, wanted_sums = gradients(1)
    found, sums = gradients(8)
    assert sums == pytest.approx(wanted_sums, rel=1e-5)
    assert_close(wanted, found, 1e-5)


def test_the_objective_is_the_weighted_sum_of_the_two_means(config: MakeConfig) -> None:
    """Equation 4, computed here from a plain forward pass of the whole batch."""
    trainer = Trainer(config("image_loss_weight=3.0", "batch_size=9"))
    data, model = trainer.train_data, trainer.model
    documents = data.documents(0, 9)
    batch = data.batch(documents)
    arrays, (target,), text_target, text_weight = to_arrays(batch, model)
    weights = tree_map(
        lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(1)), trainer.state.weights
    )

    def objective(w: Any) -> mx.array:
        model.update(w)
        logits, prediction = model(arrays)
        text = losses.text_loss(logits, text_target, text_weight) / batch.text_targets
        return text + 3 * (prediction - target).square().mean()

    value, wanted = mx.value_and_grad(objective)(weights)
    model.update(weights)
    trainer.state.weights = weights
    gradients, sums = gradients_of(trainer)
    assert sums[0] / batch.text_targets + 3 * sums[1] / len(batch.angle) == pytest.approx(
        value.item(), rel=1e-5
    )
    assert_close({k: np.array(v) for k, v in tree_flatten(wanted)}, gradients, 1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_add_up_by_their_tokens(config: MakeConfig, parts: int) -> None:
    """Seven documents in two or four parts: texts of other lengths, and fewer pictures here than there."""
    one, many = Trainer(config("batch_size=7")), Trainer(config("batch_size=7", f"accumulate={parts}"))
    loaded = many._load(0)
    assert len(loaded.parts) == parts
    assert len({(p.text_targets, len(p.angle)) for p in loaded.parts}) > 1
    for trainer in (one, many):
        trainer.state.weights = tree_map(
            lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(1)), trainer.state.weights
        )
    (wanted, sums), (gradients, part_sums) = gradients_of(one), gradients_of(many)
    np.testing.assert_allclose(part_sums, sums, rtol=1e-5)
    assert_close(wanted, gradients, 1e-5)


def test_text_alone_can_be_trained(config: MakeConfig, toml: Path) -> None:
    run = config("steps=3", f"data.train=[{{rows = '{toml.parent / 'texts.jsonl'}'}}]")
    train(run)
    rows = metrics(Path(run.output))
    assert all(r["image_loss"] == 0 for r in rows)
    assert rows[-1]["text_loss"] < rows[0]["text_loss"]


def test_a_part_without_pictures(config: MakeConfig) -> None:
    """With six documents in six parts, two of them are text alone."""
    trainer = Trainer(config("accumulate=6"))
    assert sorted(len(p.angle) for p in trainer._load(0).parts) == [0, 0, 1, 1, 1, 1]
    wanted, _ = gradients_of(Trainer(config()))
    gradients, _ = gradients_of(trainer)
    assert_close(wanted, gradients, 1e-5)


def test_clipping_and_its_absence(config: MakeConfig) -> None:
    """The limit scales a long gradient down to it, leaves a short one alone, and 0 switches it off."""
    steps = {}
    for clip in ("0.0", "1e9", "1.0", "2.0"):
        # A huge eps takes Adam's normalisation away: its first step is the gradient times lr / eps.
        trainer = Trainer(
            config(f"optimizer.clip={clip}", "optimizer.eps=1e6", "optimizer.weight_decay=0.0", "ema=0.0")
        )
        trainer.optimizer.learning_rate = 1e5
        w = trainer.state.weights
        gradients = tree_map(lambda v: mx.random.normal(v.shape, key=mx.random.key(v.size)), w)
        after, _, norm = trainer.step.update(gradients, w, trainer.state.ema, 0.0)
        moved = tree_map(lambda a, b: a - b, after, w)
        steps[clip] = np.sqrt(sum(float(v.square().sum()) for v in dict(tree_flatten(moved)).values()))
        assert norm.item() > 20
    assert steps["0.0"] == steps["1e9"]
    assert steps["0.0"] == pytest.approx(0.1 * norm.item(), rel=1e-3)
    assert steps["1.0"] == pytest.approx(0.1, rel=1e-3)
    assert steps["2.0"] == pytest.approx(0.2, rel=1e-3)


def reordered(tree: Any) -> Any:
    """The same tree, every dictionary filled the other way round: so it may come out of a file or a set."""
    if isinstance(tree, dict):
        return {key: reordered(tree[key]) for key in reversed(tree)}
    return [reordered(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("overrides", [[], MUON], ids=["adamw", "muon"])
def test_the_order_of_a_tree_does_not_touch_a_bit(config: MakeConfig, overrides: list[str]) -> None:
    results = []
    for order in (lambda tree: tree, reordered):
        trainer = Trainer(config(*overrides))
        weights, ema, norms = trainer.state.weights, trainer.state.ema, []
        keys = iter(mx.random.split(mx.random.key(0), 1000))
        for _ in range(8):
            names = sorted(tree_flatten(weights, destination={}).items())
            gradients = tree_unflatten([(k, 3 * mx.random.normal(v.shape, key=next(keys))) for k, v in names])
            weights, ema, norm = trainer.step.update(order(gradients), order(weights), order(ema), 0.9)
            norms.append(norm.item())
        assert min(norms) > 1  # clipping is at work
        trees = {"w": weights, "ema": ema, "o": trainer.optimizer.state}
        results.append({k: np.array(v) for k, v in tree_flatten(trees, destination={}).items()})
        results[-1]["norms"] = np.array(norms)
    assert_same(*results)
