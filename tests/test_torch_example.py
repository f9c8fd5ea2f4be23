"""`examples/emoji/two_processes.py` at its smallest: torchrun, kill -9, resume on one process, convert, paint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from PIL import Image  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = [
    'data.train=[{rows="data/emoji/val.jsonl", images="data/emoji/val.tar"}]', "data.valid=[]",
    "model.hidden_size=32",
    "data.check_images=false", "model.num_hidden_layers=1", "model.intermediate_size=48", "batch_size=4",
]  # fmt: skip


def test_from_two_processes_to_a_picture(tmp_path: Path) -> None:
    flags = [word for change in TINY for word in ("--set", change)]
    done = subprocess.run(
        [sys.executable, "examples/emoji/two_processes.py", str(tmp_path), "--steps", "12", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(2 processes wrote it)" in done.stderr
    assert "step-00000012 paints" in done.stdout
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (32, 32)


WORKER = """
import sys, time
from pathlib import Path
with open(sys.argv[1] + "/alive", "w") as alive:
    Path(sys.argv[1], "step-00000001").mkdir()
    time.sleep(10)
    alive.write("still there")
"""
LAUNCHER = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {WORKER!r}, sys.argv[1]], start_new_session=True)
"""


def test_workers_in_sessions_of_their_own_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun's are. One that lived on would train into the folder of the run that goes on."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/emoji"))
    from two_processes import train_and_kill

    os.mkfifo(tmp_path / "alive")
    with open(os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)) as alive:
        last = train_and_kill([sys.executable, "-c", LAUNCHER, str(tmp_path)], tmp_path)
        os.set_blocking(alive.fileno(), True)
        assert alive.read() == ""  # its end of the pipe was closed without a word
    assert last.name == "step-00000001"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_launch_files_are_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts/full_scale" / name)], check=True)
