"""Transfusion models in MLX: one transformer that writes text and paints images.

Importing the package loads a fast BLAS on Linux (`blas.py`) and nothing else: MLX itself comes with the first
name that needs it, so that `mlx-transfusion --help` answers at once.
"""

from importlib import import_module

from mlx_transfusion.blas import use_system_blas

__version__ = "0.1.0"

# The public names, and the module that each is taken from when it is first asked for.
_EXPORTS = {
    "UserError": "mlx_transfusion.errors",
    "load": "mlx_transfusion.model_io",
    "generate_images": "mlx_transfusion.generation",
    "describe": "mlx_transfusion.generation",
    "complete": "mlx_transfusion.generation",
}
__all__ = ["__version__", *_EXPORTS]

use_system_blas()


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
