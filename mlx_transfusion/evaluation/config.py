"""Evaluation configuration: the TOML file, with every default in one place, and where its data lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from mlx_transfusion.config import from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.toml_file import read_toml

DATA_VARIABLE = "MLX_TRANSFUSION_DATA"
"""Environment variable that names the data folder instead of the TOML's `data`."""


@dataclass(frozen=True)
class PairFiles:
    """Captioned pictures: rows {"image", "text"}, with "base" where a picture is a variant of another."""

    rows: str
    images: str | None = None
    """Folder or tar of the images; None means the folder of the jsonl file."""


@dataclass(frozen=True)
class Counts:
    """How much is measured. A set that holds less is taken whole."""

    pictures: int = 200
    """Captions painted, of each split."""
    descriptions: int = 200
    """Pictures described, of each split."""
    losses: int = 512
    """Pairs whose losses are measured, of each split."""
    texts: int = 1000
    """Validation texts of the perplexity."""
    baseline_texts: int = 10**9
    """Training texts that the n-gram baselines are fitted to."""
    frechet: int = 1000
    """Captions painted for the distances between sets of pictures, of each split."""
    references: int = 5000
    """Pictures that they are compared with, of each split."""


QUICK = Counts(pictures=8, descriptions=8, losses=16, texts=32, baseline_texts=2000, frechet=8, references=32)
"""At most this much with `quick`, which shows that everything runs; its figures mean little."""


@dataclass(frozen=True)
class Comparison:
    """Another model, whose distances are measured on the same captions and seeds."""

    model: str | None = None
    """A folder beside the TOML, or whatever `model_io.load` takes; None compares with nothing."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@dataclass(frozen=True)
class EvaluationConfig:
    """What `mlx-transfusion evaluate` measures, and on which data."""

    data: str
    """Folder that the file names below are relative to."""
    train: PairFiles
    """The pairs the model was trained on."""
    val: PairFiles
    """Pairs it has not seen."""
    train_texts: str
    """jsonl of {"text"}: what the baselines are fitted to."""
    val_texts: str
    """jsonl of {"text"}: what perplexity is measured on."""
    features: str | None = None
    """Folder of an InceptionV3 or a CLIP that `convert` made, beside the TOML: by its features the sets of pictures
    are compared. None: EfficientNet-Lite0."""
    clip: str | None = None
    """Folder of such a CLIP: painted pictures are compared with their captions. None leaves that out."""
    seed: int = 0
    description_tokens: int = 48
    """Longest description, in tokens."""
    counts: Counts = field(default_factory=Counts)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    compare: Comparison = field(default_factory=Comparison)

    def __post_init__(self) -> None:
        for f in fields(Counts):
            if (count := getattr(self.counts, f.name)) < 1:
                raise UserError(f"evaluation config: counts.{f.name} is {count}, expected 1 or more")
        if self.description_tokens < 1:
            raise UserError(
                f"evaluation config: description_tokens is {self.description_tokens}, expected 1 or more"
            )
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"evaluation config: seed is {self.seed}, expected 0 to 2^63 - 1")
        self.generation.check()
        self.compare.generation.check()

    def path(self, name: str) -> Path:
        """A data file."""
        return Path(self.data) / name

    def quick(self) -> EvaluationConfig:
        """The same with small counts."""
        counts = {f.name: min(getattr(self.counts, f.name), getattr(QUICK, f.name)) for f in fields(Counts)}
        return replace(self, counts=Counts(**counts))


def load_config(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationConfig:
    """Read an evaluation TOML; `overrides` are "key.path=value" as of a training config.

    The data folder is `data` if given, else the environment variable MLX_TRANSFUSION_DATA, else the TOML's
    key, which is relative to the TOML's folder. Raises UserError for a missing or unreadable file, unknown,
    missing or mistyped keys, and a data folder that does not exist.
    """
    path = Path(path)
    table = read_toml(path, "evaluation config", overrides)
    config = from_dict(EvaluationConfig, table, str(path))
    override = data if data is not None else os.environ.get(DATA_VARIABLE)
    folder = Path(override).expanduser() if override else path.parent / config.data
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such data folder: set {DATA_VARIABLE} to the folder that holds {config.train.rows}"
        )
    other = _beside(path, config.compare.model)
    return replace(
        config,
        data=str(folder),
        compare=replace(config.compare, model=other),
        features=_beside(path, config.features),
        clip=_beside(path, config.clip),
    )


def _beside(path: Path, name: str | None) -> str | None:
    """A folder beside the TOML, or the name as it is."""
    return str(path.parent / name) if name is not None and (path.parent / name).is_dir() else name
