"""Transfusion models in MLX: one transformer that writes text and paints images.

Importing the package loads a fast BLAS on Linux (`blas.py`) and nothing else: MLX itself comes with the first
name that needs it, so that `mlx-transfusion --help` answers at once.
"""

from typing import TYPE_CHECKING

from mlx_transfusion.blas import use_system_blas

__version__ = "0.1.0"
__all__ = [
    "GenerationSettings",
    "UserError",
    "__version__",
    "complete",
    "describe",
    "generate_images",
    "load",
]

use_system_blas()

if TYPE_CHECKING:
    from mlx_transfusion.errors import UserError
    from mlx_transfusion.generation import complete, describe, generate_images
    from mlx_transfusion.model_io import load
    from mlx_transfusion.settings import GenerationSettings
else:

    def __getattr__(name: str) -> object:
        """The public names, each imported when it is first asked for."""
        modules = {
            "GenerationSettings": "settings",
            "UserError": "errors",
            "complete": "generation",
            "describe": "generation",
            "generate_images": "generation",
            "load": "model_io",
        }
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{modules[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
