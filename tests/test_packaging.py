"""What a wheel holds, and that it works where nothing else of ours is installed."""

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlx_transfusion
from mlx_transfusion import model_path

ROOT = Path(__file__).parents[1]
BUNDLED = {
    f"mlx_transfusion/bundled/emoji/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.model")
}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    """A `wheel` or `sdist` of the tree `source`, built in this environment without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    return output / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone would have, and no others."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools >= 77: pip install '.[dev]'")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone")
    folder = tmp_path_factory.mktemp("clone")
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clean_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", clean_tree, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    """Files of the package in the wheel, without the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(clean_tree: Path, wheel: Path) -> None:
    package = {path.relative_to(clean_tree) for path in (clean_tree / "mlx_transfusion").rglob("*")}
    converters = {path.relative_to(clean_tree) for path in (clean_tree / "convert").rglob("*.py")}
    expected = {str(path) for path in package if (clean_tree / path).is_file()}
    expected |= {f"mlx_transfusion/{path}" for path in converters}
    assert names(wheel) == expected


def test_the_wheel_holds_the_bundled_model_and_the_converters(wheel: Path) -> None:
    wanted = {*BUNDLED, "mlx_transfusion/convert/__init__.py", "mlx_transfusion/py.typed"}
    assert wanted <= names(wheel)


def test_the_bundled_models_are_whole_and_small() -> None:
    """The teacher at most 16 MB, with its student at most 24 MB, each folder with a config and weights."""
    sizes = {
        folder.name: {file.name: file.stat().st_size for file in folder.iterdir()}
        for folder in (ROOT / "mlx_transfusion" / "bundled").iterdir()
    }
    assert set(sizes) == set(model_path.BUNDLED)
    for name, files in sizes.items():
        whole = {"config.json", "model.safetensors", "tokenizer.model"} <= set(files)
        assert whole or {"adapter_config.json", "adapters.safetensors"} <= set(files), name
    assert sum(sizes["emoji"].values()) <= 16e6
    assert sum(sum(sizes[name].values()) for name in model_path.PAINTERS) <= 24e6
    assert sum(sizes[model_path.EDITOR].values()) <= 10e6


def test_the_wheel_carries_the_licences_and_the_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        licences = {name.split("/licenses/")[1] for name in archive.namelist() if "/licenses/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
    assert licences == {"LICENSE", "NOTICE", "LICENSES/Apache-2.0.txt"}
    assert f"\nVersion: {mlx_transfusion.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata


def test_an_sdist_builds_the_same_wheel(clean_tree: Path, wheel: Path, tmp_path: Path) -> None:
    run("tar", "-xzf", build("sdist", clean_tree, tmp_path), cwd=tmp_path)
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names(build("wheel", tree, tmp_path)) == names(wheel)


def test_this_environment_has_the_converters_inside_the_package() -> None:
    try:
        importlib.metadata.version("mlx-transfusion")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here, only its tree is on the path")
    assert importlib.import_module("mlx_transfusion.convert").__name__ == "mlx_transfusion.convert"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Needs pip's index. What the package imports but does not declare is missing here."""
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    backend = "[cpu]" if sys.platform == "linux" else ""
    run(binaries / "python", "-m", "pip", "install", "--quiet", f"{wheel}{backend}", cwd=tmp_path)

    modules = "mlx_transfusion, mlx_transfusion.convert"
    files = run(binaries / "python", "-c", f"import {modules}; print(mlx_transfusion.__file__)", cwd=tmp_path)
    assert Path(files.strip()).is_relative_to(tmp_path)
    run(
        binaries / "mlx-transfusion",
        "generate",
        "red heart",
        "--steps",
        "2",
        "--output",
        "heart.png",
        cwd=tmp_path,
    )
    assert (tmp_path / "heart.png").read_bytes().startswith(b"\x89PNG")
