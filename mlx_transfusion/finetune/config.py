"""The few settings of a fine-tune, and the whole training config that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_transfusion import sequence
from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import resolve
from mlx_transfusion.toml_file import read_toml
from mlx_transfusion.training.config import (
    AdapterTraining,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)

DEFAULT_MODEL = "emoji"
TYPES = ("lora", "dora", "full")
LEARNING_RATES = {"lora": 1e-3, "dora": 1e-3, "full": 1e-4}
BEST_BY = "valid_image_loss"
"""The validation number whose lowest value makes the result."""
LENGTH_MULTIPLE = 16
BOS_EOS = 2


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tune, as the flags of `finetune` or the keys of its TOML."""

    data: str
    model: str = DEFAULT_MODEL
    output: str = "adapters"
    type: str = "lora"
    """"lora", "dora", or "full": all weights."""
    rank: int = 8
    scale: float = 2.0
    layers: int = -1
    """Number of blocks with an adapter, counted from the last; -1 is all."""
    targets: tuple[str, ...] = AdapterTraining.targets
    image_only: bool = False
    """An adapter for pictures that are being painted alone: text and descriptions keep every bit."""
    quantize: int | None = None
    """Bits of the frozen base while it is trained on: 4 or 8."""
    learning_rate: float | None = None
    """None: LEARNING_RATES by type."""
    iters: int = 300
    batch_size: int = 8
    accumulate: int = 1
    grad_checkpoint: bool = False
    low_ram: bool = False
    """Of a converted model: encode all pictures first, and keep out of memory what no step needs."""
    cache_limit: float | None = TrainConfig.cache_limit
    """GB of freed memory that MLX keeps for reuse."""
    dtype: str = "float32"
    caption: str | None = None
    """Of pictures that have none of their own."""
    caption_first: float = 0.8
    prior: str | None = None
    """A folder of rows like `data` with pictures that the model should go on painting as before."""
    prior_share: float = 0.5
    """Share of each batch that comes from `prior`."""
    previews: tuple[str, ...] = ()
    """Prompts to paint every `preview_every` steps."""
    preview_every: int = 100
    valid_every: int = 50
    patience: int = 0
    """Validations without a lower image loss after which the run stops early; 0 never stops it."""
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise UserError(f'finetune: type is "{self.type}", expected one of {", ".join(TYPES)}')
        if not 0 < self.prior_share < 1:
            raise UserError(f"finetune: prior_share is {self.prior_share}, expected between 0 and 1")
        if self.type == "full" and (self.image_only or self.quantize is not None):
            raise UserError("finetune: image_only and quantize are for adapters: use type lora or dora")


def read_finetune_config(file: Path | None, flags: Mapping[str, Any]) -> FinetuneConfig:
    """A TOML's keys with the flags that were given (not None) over them. Raises UserError."""
    data: dict[str, Any] = {}
    if file is not None:
        data = read_toml(file, "config")
        for key in ("data", "prior", "model"):
            if isinstance(data.get(key), str) and (file.parent / data[key]).exists():
                data[key] = str(file.parent / data[key])
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    if "data" not in data | given:
        raise UserError("give --data DIR, a folder with pictures and captions")
    return from_dict(FinetuneConfig, data | given, str(file or "finetune"))


Place = tuple[Path, Path]
"""A jsonl file and where its pictures are."""


def train_config(
    config: FinetuneConfig,
    max_position: int,
    rows: Mapping[str, Place],
    prior: Place | None,
    lengths: Sequence[int],
) -> TrainConfig:
    """The training run of a fine-tune.

    max_position: of the model's sequences; rows, prior: jsonl files of `data` and `prior`; lengths: positions that
    each document takes. Raises UserError for values out of range.
    """
    longest = max(lengths)
    if longest > max_position:
        raise UserError(f"finetune: a document of {longest} tokens, and the model takes {max_position}")
    rate = LEARNING_RATES[config.type] if config.learning_rate is None else config.learning_rate
    train = [_source(rows["train"], 1.0 if prior is None else 1 - config.prior_share)]
    if prior is not None:
        train.append(_source(prior, config.prior_share))
    valid = (_source(rows["valid"]),) if "valid" in rows else ()
    if config.patience and not (valid and config.valid_every):
        raise UserError(
            f"finetune: patience needs pictures to validate on: put valid.jsonl beside train.jsonl in {config.data}"
        )
    return TrainConfig(
        output=config.output,
        tokenizer=str(resolve(config.model)),
        # Text behind a picture would read it through the adapter, and no image-only adapter does that later.
        data=DataConfig(
            tuple(train), valid, caption_first=1.0 if config.image_only else config.caption_first
        ),
        init=config.model,
        steps=config.iters,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        sequence_length=min(sequence.bucket(longest, LENGTH_MULTIPLE), max_position),
        seed=config.seed,
        dtype=config.dtype,
        gradient_checkpointing=config.grad_checkpoint,
        low_ram=config.low_ram,
        cache_limit=config.cache_limit,
        ema=0.99,
        valid_every=config.valid_every if valid else 0,
        best_by=BEST_BY if valid and config.valid_every else "",
        patience=config.patience,
        save_every=config.save_every,
        diffusion=DiffusionConfig(high_noise_share=(0.25, 0.25)),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=min(20, config.iters), weight_decay=0.0),
        sample=SampleConfig(config.previews, config.seed, config.preview_every if config.previews else 0),
        adapter=_adapter(config),
    )


def _source(place: Place, weight: float = 1.0) -> SourceConfig:
    return SourceConfig(str(place[0]), str(place[1]), weight)


def _adapter(config: FinetuneConfig) -> AdapterTraining | None:
    if config.type == "full":
        return None
    return AdapterTraining(
        type=config.type,
        rank=config.rank,
        scale=config.scale,
        layers=config.layers,
        targets=config.targets,
        modality="image" if config.image_only else "both",
        quantize=config.quantize,
    )
