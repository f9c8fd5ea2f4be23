"""The TOML file of an autoencoder's training, with every default in one place."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.toml_file import read_toml
from mlx_transfusion.training.config import OptimizerConfig, SourceConfig

OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-4, "warmup": 100, "betas": (0.5, 0.9), "weight_decay": 0.0, "final_fraction": 0.1,
}  # fmt: skip
"""What differs from the defaults of a model's training: an adversary asks for less momentum."""


@dataclass(frozen=True)
class PictureData:
    """Which pictures are learned: all those that rows name, each once an epoch."""

    train: tuple[SourceConfig, ...]
    valid: tuple[SourceConfig, ...] = ()
    size: int = 256
    """Height and width that pictures are brought to."""
    flip: float = 0.5
    """Share of pictures mirrored left to right."""
    skip_bad_rows: bool = False
    check_images: bool = True
    threads: int = 2
    cache_gib: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """L1 + perceptual + identity + gan * adversarial + kl * divergence (as arXiv 2408.11039).

    With a codebook its losses stand in the place of the divergence.

    All terms are means over pixels and channels, the divergence too (nats over the number of pixel values).
    """

    perceptual: float = 1.0
    """0 leaves it out, and the weights of EfficientNet-Lite0 with it."""
    perceptual_blocks: tuple[int, ...] = (0, 2, 4, 10)
    """Blocks of EfficientNet-Lite0 (0 to 15) whose output is compared."""
    lpips: str | None = None
    """The folder of LPIPS that `convert` wrote: the perceptual distance, in the place of EfficientNet-Lite0."""
    identity: float = 0.0
    """Weight of the distance of pooled features; 0.2 in the paper, on features of MoCo v2."""
    gan: float = 0.5
    gan_start: int = 50000
    """Step from which on the discriminator is trained and counts; one behind the last leaves it out."""
    kl: float = 1e-6

    @property
    def needs_efficientnet(self) -> bool:
        """Whether a term compares its features."""
        return self.identity > 0 or (self.perceptual > 0 and self.lpips is None)


@dataclass(frozen=True)
class CodebookConfig:
    """How a codebook is learned, where [model.quantizer] asks for one (arXiv 1711.00937)."""

    loss: float = 1.0
    """Weight of the codebook's own loss; of no use with `ema`."""
    commitment: float = 0.25
    ema: bool = False
    """Codes follow the running means of what is assigned to them, in the place of their loss."""
    decay: float = 0.99
    """Of the running sums, of which the metrics' perplexity is made too."""
    revive_below: float = 0.02
    """A code whose running count falls below this part of an even use moves to an element of the batch. 0: none."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A net of patches (arXiv 1611.07004): strided 4x4 convolutions down to one verdict for each region."""

    channels: int = 64
    layers: int = 3
    """Halvings; channels double from one to the next, up to eight times."""
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class AutoencoderTraining:
    """One training run. File names are relative to the TOML, `output` to the current folder."""

    data: PictureData
    model: AutoencoderConfig
    output: str = "runs/autoencoder"
    init: str | None = None
    """The folder of an autoencoder to start from."""
    steps: int = 100000
    batch_size: int = 16
    seed: int = 0
    ema: float = 0.999
    compile: bool = True
    log_every: int = 10
    valid_every: int = 0
    valid_pictures: int = 256
    save_every: int = 500
    keep: int = 2
    scale_pictures: int = 512
    """Training pictures that the latents' scale and the preview are measured on, whenever a checkpoint is written."""
    loss: LossConfig = field(default_factory=LossConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(**OPTIMIZER))

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = operator.attrgetter(name)(self)
            for one in value if isinstance(value, tuple) else (value,):
                if not low <= one <= high:
                    wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
                    raise UserError(f"training config: {name} is {one}, expected {wanted}")
        if not self.data.train:
            raise UserError("training config: data.train is empty, expected at least one source of rows")
        if self.optimizer.name != "adamw":
            raise UserError('training config: optimizer.name: an autoencoder is trained with "adamw"')
        if self.data.size % self.model.factor:
            raise UserError(
                f"training config: data.size {self.data.size} must be a multiple of {self.model.factor}, which "
                "the autoencoder's halvings ask for"
            )
        if self.loss.needs_efficientnet and self.data.size % 32:
            raise UserError(
                f"training config: data.size {self.data.size} must be a multiple of 32 for the perceptual loss; "
                "or switch it off with loss.perceptual = 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the checkpoint's record."""
        return dataclasses.asdict(self)


_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("steps", "batch_size", "log_every", "save_every", "keep", "scale_pictures", "valid_pictures",
         "data.size", "data.threads", "discriminator.channels", "discriminator.layers"), (1, math.inf)),
    **dict.fromkeys(
        ("valid_every", "loss.perceptual", "loss.identity", "loss.gan", "loss.gan_start", "loss.kl",
         "codebook.loss", "codebook.commitment",
         "optimizer.learning_rate", "optimizer.warmup", "discriminator.learning_rate"), (0, math.inf)),
    **dict.fromkeys(("ema", "data.flip", "codebook.decay", "codebook.revive_below", "optimizer.final_fraction"),
                    (0, 1)),
    "loss.perceptual_blocks": (0, 15),
    "seed": (0, 2**63 - 1),
}  # fmt: skip


def load_training(path: str | Path, overrides: list[str] | None = None) -> AutoencoderTraining:
    """Read such a TOML. overrides: "key.path=value" with TOML values.

    Raises UserError for a missing or unreadable file and for unknown, missing or mistyped keys.
    """
    path = Path(path)
    data = read_toml(path, "training config", overrides or [])
    _resolve(data, path.parent)
    return from_dict(AutoencoderTraining, data, str(path))


def _resolve(data: dict[str, Any], folder: Path) -> None:
    """Make the file names of the TOML relative to its own folder; complete [optimizer] from this file's defaults."""

    def fix(table: Any, key: str) -> None:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(folder / table[key])

    fix(data, "init")
    fix(data.get("loss"), "lpips")
    tables = data.get("data", {})
    for split in ("train", "valid"):
        rows = tables.get(split, []) if isinstance(tables, dict) else []
        for source in rows if isinstance(rows, list) else []:
            fix(source, "rows")
            fix(source, "images")
    if isinstance(data.get("optimizer"), dict):
        data["optimizer"] = OPTIMIZER | data["optimizer"]
