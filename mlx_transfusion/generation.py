"""The public names of generation, from weights to pictures and words.

>>> # loaded = load(); image = generate_images(loaded, "red heart", seeds=1)[0]; image.save("heart.png")
"""

from mlx_transfusion.batched_text import Written, write_batch
from mlx_transfusion.events import Event, Finished, GeneratedImage, Painted, Step, Token
from mlx_transfusion.interleave import complete, describe
from mlx_transfusion.painting import paint
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.text_to_image import generate_images, iter_images

__all__ = [
    "DEFAULTS",
    "Event",
    "Finished",
    "GeneratedImage",
    "GenerationSettings",
    "Painted",
    "Step",
    "Token",
    "Written",
    "complete",
    "describe",
    "generate_images",
    "iter_images",
    "paint",
    "write_batch",
]
