"""The names that `import mlx_transfusion` offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import mlx_transfusion
from mlx_transfusion import errors, generation, model_io

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_and_listed() -> None:
    assert set(mlx_transfusion.__all__) <= set(dir(mlx_transfusion))
    assert all(hasattr(mlx_transfusion, name) for name in mlx_transfusion.__all__)


def test_the_names_are_those_of_the_modules() -> None:
    assert mlx_transfusion.load is model_io.load
    assert mlx_transfusion.generate_images is generation.generate_images
    assert mlx_transfusion.describe is generation.describe
    assert mlx_transfusion.complete is generation.complete
    assert mlx_transfusion.UserError is errors.UserError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(mlx_transfusion, "nonsense")  # noqa: B009  (a type checker would object to the plain form)


def test_the_error_type_comes_without_mlx() -> None:
    code = "import sys; from mlx_transfusion import UserError; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
