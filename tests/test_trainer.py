"""Training end to end on generated data: learning, exact resume after any kind of stop, and bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from PIL import Image
from tiny_training import write_jsonl, write_run

import mlx_transfusion
from mlx_transfusion import losses
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load, save_model
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training import checkpoint as ckpt
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.data import DataSet
from mlx_transfusion.training.step import to_arrays
from mlx_transfusion.training.trainer import Trainer, train

Arrays = dict[str, np.ndarray]
MUON = ["optimizer.name=muon", "optimizer.muon_learning_rate=0.02", "ema=0.8"]


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture
def config(toml: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`config("steps=3", output="again")`: the tiny run with overrides, in a folder of its own."""

    def make(*overrides: str, output: str = "out") -> TrainConfig:
        return load_train_config(toml, [*overrides, f"output={tmp_path / output}"])

    return make


MakeConfig = Callable[..., TrainConfig]


def state(checkpoint: Path) -> Arrays:
    """Weights, average and optimiser of a checkpoint, under names that tell them apart."""
    files = ("train.safetensors", "model.safetensors", "optimizer.safetensors")
    return {
        f"{file}:{name}": np.array(v) for file in files for name, v in mx.load(str(checkpoint / file)).items()
    }


def assert_same(a: Arrays, b: Arrays) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


VARIES = {"tokens_per_second", "peak_memory_gb"}


def losses_of(output: Path) -> list[dict[str, Any]]:
    """The metrics that must repeat exactly."""
    return [{k: v for k, v in row.items() if k not in VARIES} for row in metrics(output)]


@pytest.fixture(scope="module")
def uninterrupted(
    toml: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Arrays, list[dict]]]:
    """The end of the six steps of the tiny run (with Muon, which has the most state), and its metrics."""
    output = tmp_path_factory.mktemp("uninterrupted")
    last = train(load_train_config(toml, [*MUON, f"output={output}"]))
    return state(last), losses_of(output)


# --- learning ---


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


def assert_close(a: Arrays, b: Arrays, tolerance: float) -> None:
    for name, value in a.items():
        assert np.linalg.norm(b[name] - value) <= tolerance * np.linalg.norm(value) + 1e-9, name


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


def test_the_objective_is_the_weighted_sum_of_the_two_means(config: MakeConfig) -> None:
    """Equation 4, computed here from a plain forward pass of the whole batch."""
    trainer = Trainer(config("image_loss_weight=3.0", "batch_size=9"))
    data, model = trainer.train_data, trainer.model
    documents = data.documents(0, 9)
    batch = data.batch(documents)
    arrays, target, text_target, text_weight = to_arrays(batch, model)
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


LAUNCHED = """
import sys
from mlx_transfusion.training.config import load_train_config
from mlx_transfusion.training.trainer import train
train(load_train_config(sys.argv[1], sys.argv[2:]))
"""


def free_ports() -> int:
    """A port that is free together with its successor."""
    for _ in range(50):
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = int(a.getsockname()[1])
            try:
                b.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free ports")


def environment() -> dict[str, str]:
    """That of a new process which finds the package where this one did."""
    root = str(Path(mlx_transfusion.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon"])
def test_two_processes_equal_one(config: MakeConfig, toml: Path, tmp_path: Path, name: str) -> None:
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not installed beside Python")
    overrides = [*MUON, "batch_size=7", "steps=4", "optimizer.muon_learning_rate=0.01"]
    one = train(config(*overrides, output="one"))
    (tmp_path / "run.py").write_text(LAUNCHED)
    launch = [str(launcher), "-n", "2", "--backend", "ring", "--starting-port", str(free_ports()), "--"]
    script = [str(tmp_path / "run.py"), str(toml), *overrides, f"output={tmp_path / 'two'}"]
    command = [sys.executable, *launch, sys.executable, *script]
    # stdin stays open: the launcher reads it without end, and takes all of a core when there is nothing to read
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    two = tmp_path / "two"
    found = ckpt.checkpoints(two / "checkpoints")
    assert found, output.decode()
    assert found[-1].name == one.name
    assert [r["step"] for r in metrics(two)] == [1, 2, 3, 4]  # only one of them wrote
    for a, b in zip(losses_of(tmp_path / "one"), losses_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    wanted, got = state(one), state(found[-1])
    assert_close({k: v for k, v in wanted.items() if "optimizer" not in k}, got, 1e-4)


def test_more_processes_or_parts_than_documents(config: MakeConfig) -> None:
    trainer = Trainer(config())

    class Group:
        def size(self) -> int:
            return 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "init", Group)
        with pytest.raises(UserError, match="batch_size 6 is too small for 7 processes"):
            Trainer(trainer.config)


# --- stopping and going on ---


class Crash(BaseException):
    """Nothing after it is done, as after SIGKILL."""


def crash_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer._after_step

    def after_step(self: Trainer, *args: Any) -> None:
        original(self, *args)
        if self.state.step == step:
            raise Crash

    monkeypatch.setattr(Trainer, "_after_step", after_step)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_run(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]], stop: int
) -> None:
    run = config(*MUON)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, stop)
        with pytest.raises(Crash):
            train(run)
    last = train(run)
    assert_same(uninterrupted[0], state(last))
    assert losses_of(Path(run.output)) == uninterrupted[1]
    assert [p.name for p in ckpt.checkpoints(last.parent)] == ["step-00000004", "step-00000006"]


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


def test_adamw_in_parts_resumes_exactly(config: MakeConfig) -> None:
    overrides = ["steps=4", "accumulate=2", "dtype=bfloat16"]
    whole = train(config(*overrides, output="whole"))
    run = config(*overrides)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            train(run)
    assert_same(state(whole), state(train(run)))


def test_killed_at_random_operations_on_files(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    """One run, killed again and again wherever it touches the disk, ends as if nothing had happened."""
    run = config(*MUON, "save_every=1")
    dice = random.Random(0)
    kills = 0
    while True:
        left = dice.randrange(1, 90)

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Crash
                return call(*args, **kwargs)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            patch.setattr(mx, "save_safetensors", wrap(mx.save_safetensors))
            try:
                last = train(run)
                break
            except Crash:
                kills += 1
        for path in ckpt.checkpoints(Path(run.output) / "checkpoints"):
            assert load(path).config.hidden_size == 32
        assert kills < 50
    assert kills >= 2
    assert_same(uninterrupted[0], state(last))
    assert losses_of(Path(run.output)) == uninterrupted[1]


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started pytest without it
from mlx_transfusion.cli import main
main(["train", sys.argv[1], *(part for item in sys.argv[2:] for part in ("--set", item))])
"""


SLOWLY = """
import time
from mlx_transfusion.training.trainer import Trainer
after_step = Trainer._after_step
Trainer._after_step = lambda self, *args: (after_step(self, *args), time.sleep(0.3))[0]
"""

WAITING = """
import time
from mlx_transfusion.training.interrupt import Interrupt
from mlx_transfusion.training.trainer import Trainer
heard, note, after_step = [], Interrupt._note, Trainer._after_step

def hear(self, *args):
    heard.append(1)
    note(self, *args)

def wait(self, *args):
    after_step(self, *args)
    while self.state.step == 2 and self.group.rank() == self.group.size() - 1 and not heard:
        time.sleep(0.01)

Interrupt._note, Trainer._after_step = hear, wait
"""


def start(before: str, toml: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """`mlx-transfusion train` in a process of its own, after the lines `before`."""
    return subprocess.Popen(
        [sys.executable, "-c", before + RUN, str(toml), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | variables,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_sigkill_at_random_moments(
    toml: Path, tmp_path: Path, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    """Real processes: killed while a checkpoint is being written, and at random moments between."""
    output = tmp_path / "out"
    folder = output / "checkpoints"
    dice = random.Random(1)
    launches = [*MUON, "save_every=1", f"output={output}"]
    killed = 0
    for k in range(4):
        process = start(SLOWLY, toml, *launches)
        done = len(ckpt.checkpoints(folder)) and ckpt.checkpoints(folder)[-1].name

        def progressed(done: Any = done) -> bool:
            found = ckpt.checkpoints(folder)
            return bool(found) and found[-1].name != done

        if k % 2:  # in the middle of the first save
            wait_for(
                process,
                lambda: folder.is_dir() and any(p.name.startswith(".writing-step") for p in folder.iterdir()),
            )
        else:
            wait_for(process, progressed)
            time.sleep(dice.uniform(0, 0.03))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for path in ckpt.checkpoints(folder):
            load(path)
            assert ckpt.read_record(path)["step"] == int(path.name[-8:])
    assert killed >= 2
    last = train(load_train_config(toml, launches))
    assert_same(uninterrupted[0], state(last))
    assert losses_of(output) == uninterrupted[1]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000006"]


def test_ctrl_c_saves_the_step_in_hand_and_exits_130(
    toml: Path, tmp_path: Path, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    output = tmp_path / "out"
    overrides = [*MUON, "save_every=100", f"output={output}"]
    process = start(WAITING, toml, *overrides)
    log = output / "metrics.jsonl"
    wait_for(process, lambda: log.exists() and log.read_text().count("\n") == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (saved,) = ckpt.checkpoints(output / "checkpoints")
    assert ckpt.read_record(saved)["step"] == 3
    last = train(load_train_config(toml, overrides))
    assert_same(uninterrupted[0], state(last))
    assert losses_of(output) == uninterrupted[1]


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_stops_both(toml: Path, tmp_path: Path) -> None:
    """They agree on the step after which they stop: one alone would leave the other waiting for its gradients."""
    port = free_ports()
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    overrides = [*MUON, "save_every=100", f"output={tmp_path / 'out'}"]
    pair = [start(WAITING, toml, *overrides, MLX_RANK=str(r), MLX_HOSTFILE=str(hosts)) for r in range(2)]
    try:
        log = tmp_path / "out" / "metrics.jsonl"
        wait_for(pair[1], lambda: log.exists() and log.read_text().count("\n") == 2)
        pair[1].send_signal(signal.SIGINT)
        for process in pair:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 130, err
            assert "Traceback" not in err
    finally:
        for process in pair:
            process.kill()
    (saved,) = ckpt.checkpoints(tmp_path / "out" / "checkpoints")
    assert ckpt.read_record(saved)["step"] == 3


@pytest.mark.parametrize("where", ["gradients", "update"])
def test_ctrl_c_in_the_middle_of_a_step(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The optimiser is a step ahead of the weights while a step is under way: that must not be saved."""
    run = config(*MUON, "save_every=100")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = Trainer(run)
    original = getattr(trainer.step, where)

    def interrupted(*args: Any) -> Any:
        result = original(*args)
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(trainer.step, where, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    (saved,) = ckpt.checkpoints(Path(run.output) / "checkpoints")
    assert ckpt.read_record(saved)["step"] in (3, 4)
    assert_same(uninterrupted[0], state(train(run)))


def test_a_second_ctrl_c_stops_at_once(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("save_every=100", "steps=100")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = Trainer(run)
    original = trainer.step.update

    def twice(*args: Any) -> Any:
        if trainer.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(trainer.step, "update", twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ckpt.checkpoints(Path(run.output) / "checkpoints") == []


def test_a_full_disk_stops_the_run_and_loses_nothing(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    run = config(*MUON)
    folder = Path(run.output) / "checkpoints"
    real = mx.save_safetensors

    def full(path: str, *args: Any) -> None:
        if "step-00000004" in path and path.endswith("optimizer.safetensors"):
            real(path, *args)
            os.truncate(path, 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        with pytest.raises(
            UserError, match=r"step-00000004: cannot save the checkpoint \(disk full\)"
        ) as error:
            train(run)
    assert "\n" not in str(error.value)
    assert [p.name for p in folder.iterdir()] == ["step-00000002"]
    assert_same(uninterrupted[0], state(train(run)))
    assert losses_of(Path(run.output)) == uninterrupted[1]


def test_metrics_on_a_full_disk(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space left"):
        train(run)


def test_metrics_cut_off_in_the_middle_of_a_line(
    config: MakeConfig, uninterrupted: tuple[Arrays, list[dict]]
) -> None:
    run = config(*MUON)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            train(run)
    log = Path(run.output) / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 4, "text_lo')
    train(run)
    assert losses_of(Path(run.output)) == uninterrupted[1]


def test_a_finished_run_is_left_as_it_is(config: MakeConfig) -> None:
    run = config("steps=2")
    last = train(run)
    before = {p.name: p.stat().st_mtime_ns for p in last.iterdir()}
    assert train(run) == last
    assert {p.name: p.stat().st_mtime_ns for p in last.iterdir()} == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(config: MakeConfig) -> None:
    run = config(*MUON, "save_every=1")
    real = DataSet.batch

    def poisoned(self: DataSet, documents: Any) -> Any:
        batch = real(self, documents)
        if documents[0].number >= 4 * 6:  # the fifth step
            batch.noise[0, 0, 0, 0] = np.inf
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSet, "batch", poisoned)
        with pytest.raises(
            UserError, match=r"step 5: not finite any more .*the last checkpoint is good"
        ) as error:
            train(run)
    assert "\n" not in str(error.value)
    found = ckpt.checkpoints(Path(run.output) / "checkpoints")
    assert [p.name for p in found] == ["step-00000003", "step-00000004"]
    assert all(np.isfinite(v).all() for v in state(found[-1]).values())
    assert [r["step"] for r in metrics(Path(run.output))] == [1, 2, 3, 4]


# --- one run, one config ---


CHANGES = [
    ("optimizer.learning_rate=0.5", "optimizer.learning_rate = 0.003, the config says 0.5"),
    ("data.caption_drop=0.5", "data.caption_drop = 0.1, the config says 0.5"),
    ("model.intermediate_size=64", "model.intermediate_size = 48, the config says 64"),
    ("model.qk_norm=true", "model.qk_norm = None, the config says True"),
    ("steps=12", "steps = 2, the config says 12"),
    ("seed=1", "seed = 0"),
    ("batch_size=7", "batch_size = 6"),
    ("optimizer.betas=[0.9, 0.99]", "optimizer.betas.1 = 0.95"),
]


@pytest.fixture(scope="module")
def two_steps(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    train(load_train_config(toml, ["steps=2", f"output={output}"]))
    return output


@pytest.mark.parametrize(("override", "message"), CHANGES)
def test_another_config_is_refused_naming_the_key(
    toml: Path, two_steps: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"was trained with {message}") as error:
        train(load_train_config(toml, ["steps=2", f"output={two_steps}", override]))
    assert "\n" not in str(error.value)


def test_what_may_change_on_resume(toml: Path, two_steps: Path, tmp_path: Path) -> None:
    """Files that have moved, and how the run is watched."""
    moved = tmp_path / "moved"
    shutil.copytree(toml.parent, moved)
    shutil.copytree(two_steps, tmp_path / "out")
    overrides = ["log_every=7", "keep=5", "save_every=3", "accumulate=2", "compile=false", "data.threads=1",
                 "data.cache_gib=0", "gradient_checkpointing=true", "sample.prompts=['x']"]  # fmt: skip
    run = load_train_config(moved / "train.toml", ["steps=2", f"output={tmp_path / 'out'}", *overrides])
    assert train(run).name == "step-00000002"


def test_without_resume_an_output_with_checkpoints_is_refused(toml: Path, two_steps: Path) -> None:
    with pytest.raises(UserError, match="holds checkpoints already"):
        train(load_train_config(toml, ["steps=2", f"output={two_steps}"]), resume=False)


def test_a_corrupt_checkpoint_is_reported(toml: Path, two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "out")
    (last,) = ckpt.checkpoints(tmp_path / "out" / "checkpoints")
    os.truncate(last / "train.safetensors", 5000)
    with pytest.raises(UserError, match=r"step-00000002: cannot be resumed from"):
        train(load_train_config(toml, ["steps=2", f"output={tmp_path / 'out'}"]))


def test_an_output_that_cannot_be_written(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the training output"):
        train(config(output="file/out"))


def test_samples_that_cannot_be_written(config: MakeConfig) -> None:
    run = config("steps=2", "sample.every=1", "sample.prompts=['red']")
    output = Path(run.output)
    output.mkdir()
    (output / "samples").write_text("in the way")
    with pytest.raises(UserError, match=r"step-00000001\.png: cannot write the picture"):
        train(run)


def test_bad_rows_are_skipped_and_counted(
    config: MakeConfig, toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "red heart"}, {"text": ""}, {"image": "no.png", "text": "x"}]
    source = f"data.train=[{{rows = '{write_jsonl(tmp_path / 'rows.jsonl', rows)}'}}]"
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        train(config(source, "steps=1"))
    train(config(source, "steps=1", "data.skip_bad_rows=true"))
    out, err = capsys.readouterr()
    assert "rows.jsonl:3: " in err
    assert "skipped 2 bad rows in all" in err
    assert out == ""


# --- what else a run leaves behind ---


def test_validation_and_sample_grids(config: MakeConfig, toml: Path) -> None:
    pairs = toml.parent / "pairs.jsonl"
    run = config(
        "steps=4", "valid_every=2", "valid_batches=2", "sample.every=2", "sample.prompts=['red heart', 'blue star']",
        f"data.valid=[{{rows = '{pairs}', images = '{toml.parent / 'pictures'}'}}]",
    )  # fmt: skip
    last = train(run)
    output = Path(run.output)
    valid = [r for r in metrics(output) if "valid_text_loss" in r]
    assert [r["step"] for r in valid] == [2, 4]
    assert all(np.isfinite(r[k]) and r[k] > 0 for r in valid for k in ("valid_text_loss", "valid_image_loss"))
    assert sorted(p.name for p in (output / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    with Image.open(output / "samples" / "step-00000004.png") as picture:
        picture.load()
        assert picture.width >= 2 * 8
    # Neither changes the training: the same run without them ends in the same weights.
    assert_same(state(last), state(train(config("steps=4", output="plain"))))


def test_validation_measures_the_average_weights(config: MakeConfig, toml: Path) -> None:
    run = config(f"data.valid=[{{rows = '{toml.parent / 'texts.jsonl'}'}}]", "valid_batches=1")
    trainer = Trainer(run)
    before = trainer._validate()
    assert before["valid_image_loss"] == 0
    assert trainer._validate() == before  # fixed documents
    trainer.state.ema = tree_map(lambda w: w * 0, trainer.state.ema)
    assert trainer._validate()["valid_text_loss"] == pytest.approx(np.log(288), rel=1e-5)
    weights = dict(tree_flatten(trainer.model.parameters()))
    assert all(mx.array_equal(v, weights[k]).item() for k, v in tree_flatten(trainer.state.weights))


def test_start_from_a_model_folder(
    config: MakeConfig, two_steps: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    trainer = Trainer(config(f"init={first}"))
    wanted = dict(tree_flatten(load(first).model.parameters()))
    for name, value in tree_flatten(trainer.state.weights):
        assert mx.array_equal(value, wanted[name]).item(), name
    run = config(f"init={first}", "steps=1", "optimizer.learning_rate=0.0")
    weights = {k: v for k, v in state(train(run)).items() if k.startswith("train")}
    for name, value in weights.items():
        np.testing.assert_array_equal(value, wanted[name.removeprefix("train.safetensors:")])
    with pytest.raises(
        UserError, match=r"init .*tiny: its intermediate_size is 64, \[model\] of this run says 48"
    ):
        Trainer(config(f"init={tiny_model_dir}", output="other"))
    with pytest.raises(UserError):
        Trainer(config(f"init={tmp_path}", output="other"))


def test_resuming_needs_no_start(config: MakeConfig, two_steps: Path, tmp_path: Path) -> None:
    """The model that a run started from may be gone when the run goes on."""
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    start = shutil.copytree(first, tmp_path / "start")
    run = config(f"init={start}", "steps=3")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            train(run)
    shutil.rmtree(start)
    assert train(run).name == "step-00000003"


def test_half_precision_weights_are_trained_in_float32(
    config: MakeConfig, two_steps: Path, tmp_path: Path
) -> None:
    (first,) = ckpt.checkpoints(two_steps / "checkpoints")
    loaded = load(first)
    half = save_model(tmp_path / "half", loaded.model, loaded.tokenizer, dtype=mx.float16)
    trainer = Trainer(config(f"init={half}"))
    assert {v.dtype for _, v in tree_flatten(trainer.state.weights)} == {mx.float32}


def test_the_same_seed_gives_the_same_run_and_another_does_not(config: MakeConfig) -> None:
    a, b, c = (
        state(train(config("steps=2", f"seed={seed}", output=name)))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert_same(a, b)
    name = "train.safetensors:layers.0.mlp.up_proj.weight"
    assert np.abs(a[name] - c[name]).max() > 1e-3


def test_the_checkpoint_paints(config: MakeConfig) -> None:
    last = train(config("steps=1"))
    model = load(last).model
    assert isinstance(model, Transfusion)
    _, cache = model.prefill(np.array([[1, 4]]), np.array([2]))
    shape = (1, model.config.patches_per_image, model.config.patch_dim)
    assert mx.isfinite(model.velocity(mx.zeros(shape), mx.array([1.0]), cache)).all().item()
