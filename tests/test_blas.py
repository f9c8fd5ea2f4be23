"""The BLAS loaded before MLX. Each test starts its own Python: what is loaded stays loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_transfusion import blas

ROOT = Path(__file__).parents[1]
LINUX = sys.platform.startswith("linux")
on_linux = pytest.mark.skipif(not LINUX, reason="only Linux needs another BLAS than MLX's own")


def run(code: str, **environment: str) -> tuple[str, str]:
    """Standard output and error of `code` in a new interpreter that sees this source tree."""
    inherited = {name: v for name, v in os.environ.items() if name not in (blas.VARIABLE, "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


@pytest.fixture(scope="module")
def system_blas() -> str:
    """File of this machine's fast BLAS, links resolved."""
    code = "from mlx_transfusion import blas; print(blas.find()); print(blas._global_blas())"
    name, path = run(code, MLX_TRANSFUSION_BLAS="off")[0].splitlines()
    if name == "None":
        pytest.skip("this machine has no OpenBLAS, BLIS or MKL")
    return path


def test_importing_the_package_loads_neither_mlx_nor_numpy() -> None:
    code = "import sys, mlx_transfusion; print({'mlx', 'mlx.core', 'numpy'} & set(sys.modules))"
    assert run(code)[0] == "set()"


@on_linux
def test_the_system_blas_serves_mlx(system_blas: str, tmp_path: Path) -> None:
    code = "import mlx_transfusion.blas as b, mlx.core; print(b.blas_in_use())"
    # The dynamic linker's own account of where each symbol that MLX calls was bound.
    out, err = run(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "bindings"))
    assert out.endswith(f": {system_blas}")
    assert "reference" not in out
    assert err == ""
    (account,) = tmp_path.iterdir()
    calls = re.compile(rf"binding file \S*libmlx\.so \[0\] to (\S+) \[0\].*`{blas.SYMBOL}'")
    bound = {os.path.realpath(file) for file in calls.findall(account.read_text(errors="replace"))}
    assert bound == {system_blas}


@on_linux
def test_products_are_right_with_the_system_blas(system_blas: str) -> None:
    code = """
import mlx_transfusion, mlx.core as mx, numpy as np
a, b = np.random.default_rng(0).standard_normal((2, 130, 130)).astype(np.float32)
exact = a.astype(np.float64) @ b.T.astype(np.float64)
print(np.abs(np.array(mx.array(a) @ mx.array(b).T) - exact).max())
"""
    assert float(run(code)[0]) < 1e-4


@on_linux
def test_off_leaves_mlx_its_own_blas_and_says_nothing() -> None:
    code = """
import mlx_transfusion.blas as b
print(b.blas_in_use())
import mlx.core
print(b.blas_in_use())
print(b._linked_blas())
"""
    out, err = run(code, MLX_TRANSFUSION_BLAS="off")
    before, after, own = out.splitlines()
    assert before == "not known before MLX is loaded"
    assert after.endswith(f": {own}")
    assert err == ""


@on_linux
def test_the_wheels_own_blas_is_called_reference_and_slow() -> None:
    own = "import mlx_transfusion.blas as b, mlx.core; print(b._linked_blas())"
    path, _ = run(own, MLX_TRANSFUSION_BLAS="off")
    if "mlx_cpu.libs" not in path:
        pytest.skip("this MLX is not the CPU wheel")
    out, err = run("import mlx_transfusion.blas as b; print(b.blas_in_use())", MLX_TRANSFUSION_BLAS=path)
    assert out == f"reference BLAS (slow): {path}"
    assert err == ""


@on_linux
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{folder}/absent.so", "No such file"),
        ("{folder}/text.so", "file too short"),
        ("libc.so.6", "no cblas_sgemm"),
    ],
)
def test_a_library_that_cannot_serve_is_named_in_one_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    path = name.format(folder=tmp_path)
    _, err = run("import mlx_transfusion", MLX_TRANSFUSION_BLAS=path)
    assert len(err.splitlines()) == 1
    assert f"{blas.VARIABLE}={path}" in err
    assert reason in err


@on_linux
def test_without_any_fast_blas_one_line_says_what_to_install() -> None:
    code = """
import os, mlx_transfusion.blas as b
b.SONAMES = ("libabsent.so.0",)
del os.environ[b.VARIABLE]
b.use_system_blas()
"""
    _, err = run(code, MLX_TRANSFUSION_BLAS="off")
    assert len(err.splitlines()) == 1
    assert "apt install libopenblas0-pthread" in err
    assert f"{blas.VARIABLE}=off" in err


@on_linux
def test_too_late_is_said_only_where_mlx_is_slow() -> None:
    late = "import mlx.core, mlx_transfusion.blas as b; print(b.blas_in_use())"
    out, err = run(late)
    lines = [line for line in err.splitlines() if "import mlx_transfusion before mlx" in line]
    assert len(lines) == len(err.splitlines()) == out.startswith("reference BLAS (slow): ")


@on_linux
def test_a_preloaded_blas_is_left_in_place(system_blas: str) -> None:
    late = "import mlx.core, mlx_transfusion.blas as b; print(b.blas_in_use())"
    out, err = run(late, LD_PRELOAD=system_blas)
    assert out.endswith(f": {system_blas}")
    assert err == ""


@on_linux
def test_reading_pictures_leaves_openblas_its_threads(system_blas: str, tmp_path: Path) -> None:
    if "openblas" not in system_blas:
        pytest.skip("only OpenBLAS has its threads changed")
    # The thread pools of mlx-data set one thread and may leave it so.
    code = f"""
import ctypes, mlx_transfusion
from pathlib import Path
from PIL import Image
from mlx_transfusion.training.image_store import ImageFolder, ImageRef
from mlx_transfusion.training.pixels import load_pixels
library = ctypes.CDLL(None)
library.openblas_set_num_threads(2)
folder = Path({str(tmp_path)!r})
Image.new("RGB", (8, 8)).save(folder / "a.png")
print(load_pixels([ImageRef(ImageFolder(folder), "a.png")] * 8, 4, 4, threads=3).shape)
print(library.openblas_get_num_threads())
"""
    assert run(code)[0].splitlines() == ["(8, 4, 4, 3)", "2"]


@pytest.mark.skipif(LINUX, reason="for the systems where nothing is loaded")
def test_elsewhere_nothing_is_loaded_or_said() -> None:
    out, err = run("import mlx_transfusion.blas as b, mlx.core; print(b.blas_in_use())")
    assert out in ("Accelerate (macOS)", "unknown")
    assert err == ""
