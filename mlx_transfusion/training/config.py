"""Training configuration: the TOML file, with every default in one place."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_transfusion.config import ModelConfig, from_dict, preset_fields
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.discrete_config import MODEL_TYPE as DISCRETE
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.toml_file import read_toml
from mlx_transfusion.training.consistency_config import ConsistencyConfig


@dataclass(frozen=True)
class SourceConfig:
    """A file of rows or a folder of shards, and its share of every batch."""

    rows: str | None = None
    images: str | None = None
    """Folder or tar of the images; None means the folder of the file of rows."""
    weight: float = 1.0
    """Share of the documents of each batch (of shards: of the sequences), relative to the other sources."""
    shards: str | None = None
    """Instead of rows, a folder that `shards build` made."""
    pictures: bool | None = None
    """Whether the shards hold pictures: so that `plan` knows it before they are built."""


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how a pair of caption and picture becomes a document."""

    train: tuple[SourceConfig, ...]
    valid: tuple[SourceConfig, ...] = ()
    latents: tuple[str, ...] = ()
    """Files of `autoencoder encode` with the pictures of all sources, latents or codes: the model learns these
    instead of pixels."""
    autoencoder: str | None = None
    """Folder of the autoencoder that made them; checkpoints carry it, so that they paint."""
    caption_first: float = 0.8
    """Share of pairs with the caption before the picture (arXiv 2408.11039, section 4.1)."""
    caption_drop: float = 0.1
    """Share of caption-first pairs whose caption is left out, which trains the guidance branch."""
    instruction_drop: float = 0.1
    """Share of edits that show the source picture without the instruction, for guidance by text."""
    source_drop: float = 0.05
    """Share of edits that show neither, for guidance by the source picture (arXiv 2211.09800, section 3.2.1)."""
    flip: float = 0.0
    """Share of pictures mirrored left to right."""
    skip_bad_rows: bool = False
    check_images: bool = True
    threads: int = 2
    cache_gib: float = 1.0
    """Decoded pictures kept in memory."""


@dataclass(frozen=True)
class DiffusionConfig:
    """Which noise angles are trained. Angles are radians: 0 is data, pi/2 is noise."""

    distribution: str = "uniform"
    """"uniform" in the angle (the paper: uniform DDPM steps of the cosine schedule) or "tan_lognormal":
    log tan(angle) ~ N(mean, std), the proposal of arXiv 2410.11081, 4.2."""
    mean: float = 0.0
    std: float = 1.3
    high_noise_share: tuple[float, float] = (0.0, 0.0)
    """Share of pictures, at the first and at the last step, drawn uniformly from [high_noise_from, pi/2] instead:
    there a small picture does not give itself away, so there the caption is learned."""
    high_noise_from: float = 1.45
    image_first_limit: float = math.pi / 4
    """Largest angle of a picture that text follows: step 500 of 1000 (arXiv 2408.11039, table 8)."""


@dataclass(frozen=True)
class AdapterTraining:
    """Train a small difference from `init`, which stays as it is, instead of a whole model (finetune/)."""

    type: str = "lora"
    """"lora" (arXiv 2106.09685) or "dora" (arXiv 2402.09353)."""
    rank: int = 8
    scale: float = 2.0
    """Factor of A B, whatever the rank: alpha / rank of the papers."""
    layers: int = -1
    """Number of blocks, counted from the last one; -1 is all."""
    targets: tuple[str, ...] = ("*.self_attn.*_proj", "*.mlp.*_proj")
    """Patterns of linear layers' names, with * and ?."""
    modality: str = "both"
    """"image": the adapter stands beside the weights that read and write, for a picture that is being painted alone
    (`ModelConfig.painter`), so that text and descriptions stay bit for bit what they were."""
    quantize: int | None = None
    """Bits of the base while it is trained on (QLoRA, arXiv 2305.14314); None keeps it as it is."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (the paper, section 4.1), or Muon for the matrices of the decoder with AdamW for the rest."""

    name: str = "adamw"
    learning_rate: float = 3e-4
    muon_learning_rate: float = 0.02
    final_fraction: float = 0.05
    """Learning rate of the last step relative to the peak (cosine)."""
    warmup: int = 4000
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""


@dataclass(frozen=True)
class SampleConfig:
    """The grid of pictures painted during training from the EMA weights."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    every: int = 0
    """Steps between grids; 0 paints none."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    output: str
    tokenizer: str
    data: DataConfig
    model: dict | None = None
    """Keys of ModelConfig; `preset` names a starting point; vocabulary and special ids come from the tokenizer.
    None: those of `init` or of the teacher."""
    init: str | None = None
    """A model folder to start from instead of random weights."""
    steps: int = 1000
    batch_size: int = 64
    """Documents per optimiser step, over all processes and accumulated parts; with shards, packed sequences."""
    accumulate: int = 1
    """Parts a batch is cut into, one after the other, to save memory."""
    sequence_length: int = 256
    image_loss_weight: float = 5.0
    """lambda of L = L_LM + lambda L_diff (arXiv 2408.11039, eq. 4)."""
    z_loss: float = 1e-5
    """Weight of log(Z)^2 in a model of type "discrete" (arXiv 2405.09818, 2.3), whose loss has no lambda."""
    seed: int = 0
    dtype: str = "float32"
    """Arithmetic of forward and backward: float32 or bfloat16; weights and optimiser stay float32."""
    gradient_checkpointing: bool = False
    low_ram: bool = False
    """Of a converted model: encode all pictures before the first step, and keep out of memory what no step needs."""
    cache_limit: float | None = None
    """GB of freed memory that MLX keeps for reuse; None is MLX's own limit."""
    compile: bool = True
    ema: float = 0.999
    log_every: int = 10
    valid_every: int = 0
    valid_batches: int = 4
    save_every: int = 500
    keep: int = 2
    """Number of checkpoints kept."""
    best_by: str = ""
    """Name of the validation number, e.g. "valid_image_loss", by whose lowest value OUTPUT/best is kept."""
    patience: int = 0
    """Validations without a lower `best_by` after which the run stops; 0 never stops it."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    consistency: ConsistencyConfig | None = None
    adapter: AdapterTraining | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            if self._absent(name):
                continue
            value = operator.attrgetter(name)(self)
            for i, one in enumerate(value if isinstance(value, tuple) else (value,)):
                _within(f"{name}[{i}]" if isinstance(value, tuple) else name, one, low, high)
        for name, allowed in _CHOICES.items():
            if self._absent(name):
                continue
            choice = operator.attrgetter(name)(self)
            if choice not in allowed:
                raise UserError(
                    f'training config: {name} is "{choice}", expected one of {", ".join(map(str, allowed))}'
                )
        self._check_start()
        if not self.data.train:
            raise UserError("training config: data.train is empty, expected at least one source of rows")
        self._check_sources()
        if self.accumulate > self.batch_size:
            raise UserError(
                f"training config: accumulate is {self.accumulate}, expected at most batch_size {self.batch_size}"
            )
        if self.sample.every and not self.sample.prompts:
            raise UserError("training config: sample.every needs sample.prompts to paint")

    def _check_start(self) -> None:
        if self.model is None and self.start is None:
            raise UserError('training config: key "model" is missing, and there is no model to start from')
        if self.consistency is not None and self.consistency.student == "painter" and self.start is None:
            raise UserError(
                'training config: consistency.student "painter" needs a teacher or init to stand beside'
            )
        if self.patience and not self.best_by:
            raise UserError("training config: patience needs best_by, the validation number to wait for")
        if self.best_by and not self.valid_every:
            raise UserError("training config: best_by needs valid_every: how often to validate")
        if self.adapter is not None and self.start is None:
            raise UserError("training config: [adapter] needs init, the model that it is added to")

    def _check_sources(self) -> None:
        packed: set[bool] = set()
        for split in ("train", "valid"):
            for i, s in enumerate(getattr(self.data, split)):
                if (s.rows is None) == (s.shards is None):
                    raise UserError(
                        f"training config: data.{split}[{i}]: give it rows or shards, one of both"
                    )
                packed.add(s.shards is not None)
        if len(packed) > 1:
            raise UserError(
                "training config: some sources are rows and others shards, which batch_size counts differently: "
                "build shards of all"
            )
        if packed == {True} and self.consistency is not None:
            raise UserError("training config: [consistency] splits documents at their pictures: give it rows")

    def _absent(self, name: str) -> bool:
        """Whether a key that may be None is, or its table."""
        table = name.partition(".")[0]
        return table in ("consistency", "adapter", "cache_limit") and getattr(self, table) is None

    @property
    def start(self) -> str | None:
        """The model whose weights training starts from: `init`, else the teacher; None is from scratch."""
        return self.init if self.init or self.consistency is None else self.consistency.teacher

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the checkpoint's record."""
        return dataclasses.asdict(self)


_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("steps", "batch_size", "accumulate", "sequence_length", "log_every", "save_every", "keep",
         "valid_batches", "data.threads", "consistency.gap_stages"), (1, math.inf)),
    **dict.fromkeys(
        ("valid_every", "patience", "cache_limit", "image_loss_weight", "z_loss", "sample.every", "diffusion.std",
         "optimizer.learning_rate",
         "optimizer.muon_learning_rate", "optimizer.warmup", "optimizer.eps", "optimizer.weight_decay",
         "optimizer.clip", "consistency.guidance", "consistency.tangent_warmup",
         "consistency.tangent_constant",
         "consistency.valid_pictures"), (0, math.inf)),
    **dict.fromkeys(
        ("ema", "data.caption_first", "data.caption_drop", "data.flip", "data.instruction_drop",
         "data.source_drop", "optimizer.final_fraction",
         "optimizer.betas", "diffusion.high_noise_share"), (0, 1)),
    **dict.fromkeys(
        ("diffusion.high_noise_from", "diffusion.image_first_limit", "consistency.angles",
         "consistency.hops_above", "consistency.anchor_below"), (0, math.pi / 2)),
    "consistency.hop": (0.01, math.pi / 2),
    "consistency.gap_factor": (2, math.inf),
    "adapter.rank": (1, math.inf),
    "adapter.layers": (-1, math.inf),
    "seed": (0, 2**63 - 1),
}  # fmt: skip
"""Smallest and largest value of each number."""

_CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "muon"),
    "diffusion.distribution": ("uniform", "tan_lognormal"),
    "consistency.method": ("scm", "ect", "scm_hops"),
    "consistency.student": ("full", "painter"),
    "consistency.text": ("data", "teacher"),
    "consistency.tangent": ("normalize", "clip", "none"),
    "adapter.type": ("lora", "dora"),
    "adapter.modality": ("both", "image"),
    "adapter.quantize": (None, 4, 8),
}


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        wanted = f"{low} or more" if high == math.inf else f"{low} to {high:.6g}"
        raise UserError(f"training config: {name} is {value}, expected {wanted}")


def load_train_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a training TOML; file names in it are relative to its folder, except `output` (to the current one).

    `init` and `consistency.teacher` are folders beside the TOML, or else whatever `load` accepts.

    `overrides` are "key.path=value" with TOML values (a bare word counts as text). Raises UserError for a
    missing or unreadable file and for unknown, missing or mistyped keys.
    """
    path = Path(path)
    data = read_toml(path, "training config", overrides or [])
    _resolve(data, path.parent)
    return from_dict(TrainConfig, data, str(path))


def model_config(config: TrainConfig, vocab_size: int, special: dict[str, int]) -> ModelConfig:
    """The ModelConfig of a run: preset, then the keys of [model], then the tokenizer's vocabulary."""
    base, data = _model_table(config)
    if data.get("model_type") == DISCRETE:
        raise UserError(f'[model]: model_type is "{DISCRETE}": this needs "transfusion"')
    return ModelConfig.from_dict({**base, **data, "vocab_size": vocab_size, **special}, "[model]")


def discrete_config(config: TrainConfig, vocab_size: int, special: dict[str, int]) -> DiscreteConfig | None:
    """The config of a run of type "discrete": as `model_config`, with the codes behind the vocabulary.

    Of a preset only what such a model has counts. None for other types.
    """
    base, data = _model_table(config)
    if data.get("model_type") != DISCRETE:
        return None
    known = {f.name for f in dataclasses.fields(DiscreteConfig)}
    base = {key: value for key, value in base.items() if key in known}
    codes = data.get("codebook_size", 0)
    size = vocab_size + codes if isinstance(codes, int) else vocab_size
    return DiscreteConfig.from_dict({**base, **data, "vocab_size": size, **special}, "[model]")


def _model_table(config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the preset that [model] names, and its other keys."""
    data = dict(config.model or {})
    name = data.pop("preset", None)
    return preset_fields(name, "[model]: ") if name is not None else {}, data


def _resolve(data: dict[str, Any], folder: Path) -> None:
    """Make the file names of the TOML relative to its own folder."""

    def fix(table: Any, key: str) -> None:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str(folder / table[key])

    fix(data, "tokenizer")
    for table, key in ((data, "init"), (data.get("consistency"), "teacher")):
        name = table.get(key) if isinstance(table, dict) else None
        if isinstance(name, str) and (folder / name).is_dir():
            fix(table, key)
    tables = data.get("data", {})
    fix(tables, "autoencoder")
    if isinstance(tables, dict) and isinstance(tables.get("latents"), list):
        tables["latents"] = [str(folder / name) for name in tables["latents"]]
    for split in ("train", "valid"):
        rows = tables.get(split, []) if isinstance(tables, dict) else []
        for source in rows if isinstance(rows, list) else []:
            for key in ("rows", "images", "shards"):
                fix(source, key)
