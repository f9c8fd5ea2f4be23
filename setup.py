"""The list of packages; everything else stands in pyproject.toml.

It is code because a declarative list cannot say "all packages below `mlx_transfusion`, and the top-level
folder `convert` under the name `mlx_transfusion.convert`" without naming each of them by hand.
"""

from setuptools import find_packages, setup

converters = ["convert", *(f"convert.{name}" for name in find_packages("convert"))]

setup(
    packages=find_packages(include=["mlx_transfusion", "mlx_transfusion.*"])
    + [f"mlx_transfusion.{name}" for name in converters],
    package_dir={"mlx_transfusion.convert": "convert"},
)
