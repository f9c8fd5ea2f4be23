"""What decides the bytes of shards, as plain data: one recipe for all processes of a build."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import TrainConfig, model_config
from mlx_transfusion.training.latents import DTYPES
from mlx_transfusion.training.shard_set import recipe_of


@dataclass(frozen=True)
class Recipe:
    """How rows become shards."""

    tokenizer: str
    """File of the tokenizer."""
    model: ModelConfig
    sequence_length: int
    autoencoder: str | None = None
    """Folder of the autoencoder whose latents are stored; None stores pixels."""
    flips: bool = False
    """Also store the latents of the mirrored picture."""
    dtype: str = "float16"
    """Of latents."""
    skip_bad_rows: bool = False
    images: str | None = None
    """Folder or tar of the pictures of all inputs; None: each beside its input, or in it."""

    def record(self) -> dict[str, Any]:
        """What a folder says of its shards: they are built and read with this alone."""
        tools = tools_of(self)
        record = recipe_of(self.model, tools.tokenizer, self.sequence_length)
        latents = tools.autoencoder is not None
        return record | {
            "autoencoder": tools.autoencoder.fingerprint if latents else None,
            "views": 1 + (self.flips and latents),
            "dtype": self.dtype if latents else "uint8",
            "skip_bad_rows": self.skip_bad_rows,
        }


@dataclass(frozen=True)
class Tools:
    """What a process needs beside the recipe; loaded once."""

    tokenizer: Tokenizer
    autoencoder: Any


@lru_cache(maxsize=1)
def tools_of(recipe: Recipe) -> Tools:
    """The tokenizer and the autoencoder of a recipe. Raises UserError for bad files."""
    tokenizer = Tokenizer.load(recipe.tokenizer)
    if recipe.autoencoder is None:
        return Tools(tokenizer, None)
    from mlx_transfusion.autoencoder.folder import load_autoencoder  # late: pixels and text need no mlx

    return Tools(tokenizer, load_autoencoder(recipe.autoencoder))


def make_recipe(
    config: TrainConfig, *, flips: bool = False, dtype: str = "float16", images: str | None = None
) -> Recipe:
    """The recipe of shards that `config` trains on. Raises UserError for a config without a model, and bad files."""
    if config.model is None:
        raise UserError("the training config has no [model], which says how large its pictures are")
    if dtype not in DTYPES:
        raise UserError(f'--dtype "{dtype}" is unknown, expected one of {", ".join(DTYPES)}')
    tokenizer = Tokenizer.load(config.tokenizer)
    model = model_config(
        config, tokenizer.vocab_size, {f"{name}_token_id": i for name, i in asdict(tokenizer.special).items()}
    )
    autoencoder = config.data.autoencoder
    if model.image_channels != 3 and autoencoder is None:
        raise UserError(
            f"[model]: image_channels is {model.image_channels}, and pictures have 3: name the autoencoder that "
            "encodes them in data.autoencoder"
        )
    if flips and autoencoder is None:
        raise UserError("--flips is for latents: pixels are mirrored in training")
    recipe = Recipe(config.tokenizer, model, config.sequence_length, autoencoder, flips, dtype,
                    config.data.skip_bad_rows, images)  # fmt: skip
    _check_latents(recipe)
    return recipe


def _check_latents(recipe: Recipe) -> None:
    autoencoder, m = tools_of(recipe).autoencoder, recipe.model
    if autoencoder is None:
        return
    if m.image_height != m.image_width:
        raise UserError(
            f"[model]: pictures of {m.image_height}x{m.image_width}: latents are made of squares alone"
        )
    if autoencoder.config.latent_channels != m.image_channels:
        raise UserError(
            f"{recipe.autoencoder}: has {autoencoder.config.latent_channels} channels, [model] says image_channels = "
            f"{m.image_channels}"
        )
