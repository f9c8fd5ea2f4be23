from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_transfusion import model_io
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import load
from mlx_transfusion.models.transfusion import Transfusion
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.checkpoint import (
    TrainState,
    checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
)  # fmt: skip
from mlx_transfusion.training.config import OptimizerConfig
from mlx_transfusion.training.optimizer import make_optimizer

RECORD: dict[str, Any] = {"config": {"steps": 9}}


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, names and types included."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class Run:
    """A model, its optimiser and state, stepped by random gradients."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, folder: Path, name: str = "adamw") -> None:
        self.model, self.tokenizer, self.folder = Transfusion(config), tokenizer, folder
        self.optimizer = make_optimizer(OptimizerConfig(name=name))
        weights = self.model.parameters()
        self.optimizer.init(weights)
        self.state = TrainState(0, weights, tree_map(lambda w: w, weights))

    def step(self) -> TrainState:
        key = mx.random.key(self.state.step)
        gradients = tree_map(lambda w: mx.random.normal(w.shape, key=key), self.state.weights)
        weights = self.optimizer.apply_gradients(gradients, self.state.weights)
        ema = tree_map(lambda a, w: 0.5 * a + 0.5 * w, self.state.ema, weights)
        mx.eval(weights, ema, self.optimizer.state)
        self.model.update(weights)
        self.state = TrainState(self.state.step + 1, weights, ema)
        return self.state

    def save(self, keep: int = 2) -> Path:
        return save_checkpoint(
            self.folder, self.state, self.optimizer, self.model, self.tokenizer, RECORD, keep
        )


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> MakeRun:
    def make(name: str = "adamw", folder: str = "checkpoints") -> Run:
        return Run(tiny_config, tiny_tokenizer, tmp_path / folder, name)

    return make


def fresh_optimizer(name: str = "adamw") -> optim.Optimizer:
    return make_optimizer(OptimizerConfig(name=name))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_comes_back_bit_for_bit(make_run: MakeRun, name: str) -> None:
    run = make_run(name)
    for _ in range(3):
        run.step()
    saved = run.save()
    assert saved.name == "step-00000003"
    optimizer = fresh_optimizer(name)
    state = load_checkpoint(saved, optimizer)
    assert state.step == 3
    assert_equal(state.weights, run.state.weights)
    assert_equal(state.ema, run.state.ema)
    assert_equal(optimizer.state, run.optimizer.state)
    assert read_record(saved) == {"step": 3, **RECORD}
    wanted = run.step()  # and goes on as if nothing had happened
    other = make_run(name, "other")
    other.optimizer, other.state = optimizer, state
    assert_equal(other.step().weights, wanted.weights)


def test_a_checkpoint_is_a_model_folder_with_the_average(make_run: MakeRun) -> None:
    run = make_run()
    run.step()
    run.step()
    loaded = load(run.save())
    assert_equal(loaded.model.parameters(), run.state.ema)
    assert loaded.config == run.model.config
    assert loaded.tokenizer.encode("red heart") == run.tokenizer.encode("red heart")
    assert_equal(run.model.parameters(), run.state.weights)  # the model trains on with its own weights


def test_the_last_k_are_kept(make_run: MakeRun) -> None:
    run = make_run()
    for _ in range(5):
        run.step()
        run.save(keep=2)
    assert [p.name for p in checkpoints(run.folder)] == ["step-00000004", "step-00000005"]
    run.step()
    run.save(keep=1)
    assert [p.name for p in run.folder.iterdir()] == ["step-00000006"]


def test_what_is_no_checkpoint_is_not_listed(make_run: MakeRun, tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nowhere") == []
    run = make_run()
    run.step()
    good = run.save()
    (run.folder / "step-00000009").mkdir()  # without state.json
    (run.folder / "notes.txt").write_text("mine")
    leftover = run.folder / ".writing-step-00000007"
    leftover.mkdir()
    (leftover / "state.json").write_text("{}")
    assert checkpoints(run.folder) == [good]
    while run.state.step < 9:
        run.step()
    second = run.save()
    assert checkpoints(run.folder) == [good, second]
    assert not leftover.exists()
    assert (run.folder / "notes.txt").read_text() == "mine"
    assert load_checkpoint(second, fresh_optimizer()).step == 9


def test_a_step_that_is_saved_already_is_left_alone(make_run: MakeRun) -> None:
    run = make_run()
    run.step()
    saved = run.save()
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in saved.iterdir()}
    assert run.save() == saved
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in saved.iterdir()} == before


def test_a_large_model_in_several_files_can_be_resumed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_io, "MAX_FILE_BYTES", 20_000)
    run = make_run()
    run.step()
    saved = run.save()
    assert len(list(saved.glob("model-*.safetensors"))) > 2
    assert_equal(load_checkpoint(saved, fresh_optimizer()).ema, run.state.ema)


# --- kills and full disks, at every single operation on files ---


class Killed(BaseException):
    """What SIGKILL is to a process: nothing after it is done."""


@contextmanager
def failing(operation: int, kind: str) -> Iterator[list[int]]:
    """Let the operation of that number fail: "kill" ends everything there, "full" is a disk without space."""
    count = [0]

    def wrap(call: Callable[..., Any], from_mlx: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if kind == "kill" and count[0] >= operation:
                raise Killed
            if kind == "full" and count[0] == operation:
                if from_mlx:
                    raise RuntimeError("[write] Unable to write 350092 bytes to file.")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", *(("mkdir", "unlink", "rmdir") if kind == "kill" else ())):
            patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(Path, "write_text", wrap(Path.write_text))
        patch.setattr(mx, "save_safetensors", wrap(mx.save_safetensors, from_mlx=True))
        yield count


@pytest.fixture
def run_with_two(make_run: MakeRun) -> Run:
    run = make_run()
    for _ in range(2):
        run.step()
        run.save(keep=2)
    run.step()
    return run


def restore(run: Run, backup: dict[str, dict[str, bytes]]) -> None:
    """Put the checkpoint folder back to what it was."""
    import shutil

    shutil.rmtree(run.folder)
    for name, files in backup.items():
        (run.folder / name).mkdir(parents=True)
        for file, data in files.items():
            (run.folder / name / file).write_bytes(data)


def contents(run: Run) -> dict[str, dict[str, bytes]]:
    return {p.name: {f.name: f.read_bytes() for f in p.iterdir()} for p in run.folder.iterdir()}


def operations(run: Run, backup: dict[str, dict[str, bytes]], kind: str) -> int:
    with failing(10**9, kind) as count:
        run.save()
    restore(run, backup)
    assert count[0] > 10
    return count[0]


def test_killed_at_any_moment_every_folder_that_looks_complete_is(run_with_two: Run) -> None:
    run, backup = run_with_two, contents(run_with_two)
    newest = set()
    for k in range(1, operations(run, backup, "kill") + 1):
        with failing(k, "kill"), pytest.raises(Killed):
            run.save()
        found = checkpoints(run.folder)
        newest.add(found[-1].name)
        for path in found:  # all of them, not only the newest
            assert load_checkpoint(path, fresh_optimizer()).step == int(path.name[-8:])
            load(path)
        run.save()  # the next attempt succeeds and cleans up
        assert sorted(p.name for p in run.folder.iterdir()) == ["step-00000002", "step-00000003"]
        assert_equal(
            load_checkpoint(checkpoints(run.folder)[-1], fresh_optimizer()).weights, run.state.weights
        )
        restore(run, backup)
    assert newest == {"step-00000002", "step-00000003"}


def test_a_disk_that_fills_at_any_moment(run_with_two: Run) -> None:
    run, backup = run_with_two, contents(run_with_two)
    for k in range(1, operations(run, backup, "full") + 1):
        with (
            failing(k, "full"),
            pytest.raises(UserError, match=r"cannot save the checkpoint \(disk full\)") as error,
        ):
            run.save()
        assert "\n" not in str(error.value)
        after = contents(run)
        assert not [name for name in after if name.startswith(".writing-step")]
        assert after["step-00000002"] == backup["step-00000002"]
        assert_equal(run.model.parameters(), run.state.weights)
        run.save()
        assert [p.name for p in checkpoints(run.folder)] == ["step-00000002", "step-00000003"]
        restore(run, backup)


@pytest.mark.parametrize("writer", ["mlx", "python"])
def test_a_real_limit_on_file_size(run_with_two: Run, writer: str) -> None:
    """What mlx and Python themselves report when a file cannot grow."""
    run, backup = run_with_two, contents(run_with_two)
    sizes = {name: len(data) for name, data in backup["step-00000002"].items()}
    assert sizes["tokenizer.model"] < sizes["optimizer.safetensors"]
    limit = sizes["tokenizer.model"] + (1 if writer == "mlx" else -1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    reason = "disk full" if writer == "mlx" else "File too large"
    try:
        with pytest.raises(UserError, match=rf"step-00000003: cannot save the checkpoint \({reason}\)"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(run) == backup


def test_a_folder_that_cannot_be_made(make_run: MakeRun) -> None:
    run = make_run(folder="file/checkpoints")
    run.folder.parent.write_text("in the way")
    with pytest.raises(UserError, match="cannot save the checkpoint"):
        run.save()


# --- reading what is broken ---

FILES = ["train.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing"])
def test_a_damaged_file_is_reported_in_one_line(make_run: MakeRun, name: str, damage: str) -> None:
    run = make_run()
    run.step()
    saved = run.save()
    file = saved / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "garbage": b"\x00garbage" * 99}[damage]
        )
    with pytest.raises(UserError) as error:
        load_checkpoint(saved, fresh_optimizer())
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"step": "1", "config": {}}', '{"step": 1, "config": 2}'])
def test_a_record_without_its_keys(make_run: MakeRun, text: str) -> None:
    run = make_run()
    run.step()
    saved = run.save()
    (saved / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json: cannot read the training state"):
        read_record(saved)


def test_the_state_of_another_optimiser(make_run: MakeRun) -> None:
    run = make_run("adamw")
    run.step()
    with pytest.raises(UserError, match="cannot be resumed from"):
        load_checkpoint(run.save(), fresh_optimizer("muon"))


def test_the_record_is_readable_json(make_run: MakeRun) -> None:
    run = make_run()
    run.step()
    assert json.loads((run.save() / "state.json").read_text())["config"] == {"steps": 9}
