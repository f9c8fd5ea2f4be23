"""What a run will take before it is started: memory, operations, time, money, checkpoints, data.

Pure arithmetic on a training TOML; no PyTorch, no GPU, no data. A source with images is taken to be pairs with
captions of a stated length, one without images to be text that fills its rows; shards with pictures to be filled with
such pairs, and shards without to be one text each sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.flops import Work, document_pairs, step_flops
from mlx_transfusion.torch import memory as mem
from mlx_transfusion.training.config import SourceConfig, TrainConfig, model_config
from mlx_transfusion.training.data import shares
from mlx_transfusion.training.shard_files import read_index

GIB = 1 << 30
SPECIAL = ("pad", "bos", "eos", "unk", "boi", "eoi")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense bfloat16 operations a second, bytes of memory, dollars an hour (a rough market price)."""

    flops: float
    memory: float
    price: float


GPUS = {
    "a100": Gpu(312e12, 80e9, 1.5),
    "h100": Gpu(989e12, 80e9, 2.5),
    "h200": Gpu(989e12, 141e9, 3.0),
    "b200": Gpu(2250e12, 180e9, 4.5),
}
"""From the makers' data sheets, without sparsity. The prices are assumptions: give your own."""


@dataclass(frozen=True)
class Assumptions:
    """What the TOML does not say."""

    gpus: int
    gpu: str = "h100"
    mfu: float = 0.4
    """Share of the GPUs' operations that the model's get."""
    price: float | None = None
    """Dollars a GPU and hour; None: that of the table."""
    caption: int = 32
    """Tokens of a caption."""
    write: float = 1e9
    """Bytes a second that one GPU's process writes of a checkpoint."""
    replicas: int = 1
    tensor: int = 1
    """GPUs that share every block and read the same documents (tensor parallelism)."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f'--gpu "{self.gpu}" is unknown, expected one of {", ".join(GPUS)}')
        groups = self.replicas * self.tensor
        if min(self.gpus, self.replicas, self.tensor) < 1 or self.gpus % groups:
            raise UserError(f"--gpus {self.gpus} cannot be dealt into {groups} equal groups")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}, expected a share above 0 and up to 1")


def model_of(config: TrainConfig) -> ModelConfig:
    """The model of a training config, with the vocabulary of [model] or its preset instead of the tokenizer's."""
    if config.model is None:
        raise UserError("the training config has no [model] to plan for")
    vocab = config.model.get("vocab_size", 32000)
    return model_config(config, vocab, {})


def check_tensor(config: ModelConfig, count: int) -> None:
    """Raises UserError when heads or feed-forward of a model cannot be dealt out to `count` processes."""
    for name, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.kv_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        if size % count:
            raise UserError(f"--tensor {count}: {name} is {size}, expected a multiple of {count}")


def step_work(config: TrainConfig, model: ModelConfig, caption: int) -> Work:
    """The work of one step of the sources' mixture."""
    counts = shares([s.weight for s in config.data.train], config.batch_size)
    positions = pairs = targets = pictures = 0
    n = model.patches_per_image
    for source, count in zip(config.data.train, counts, strict=True):
        if source.shards is not None:
            fit = (
                config.sequence_length // (caption + n + 4) if _has_pictures(source) else 0
            )  # BOS BOI EOI EOS
            rest = config.sequence_length - fit * (caption + n + 4)
            positions += count * config.sequence_length
            pairs += count * (fit * document_pairs(caption + n + 4, n) + document_pairs(rest))
            targets += count * (fit * (caption + 2) + max(0, rest - 1))
            pictures += count * fit
            continue
        if source.images is None:
            length, patches, text = config.sequence_length, 0, config.sequence_length - 1
        else:
            length, patches, text = caption + n + 4, n, caption + 2  # BOS BOI EOI EOS
            pictures += count
        if length > config.sequence_length:
            raise UserError(
                f"a document of {length} tokens does not fit sequence_length {config.sequence_length}"
            )
        positions += count * length
        pairs += count * document_pairs(length, patches if model.bidirectional else 0)
        targets += count * text
    return Work(positions, pairs, targets, pictures)


def _has_pictures(source: SourceConfig) -> bool:
    """What the config says of a folder of shards, or else the folder itself."""
    if source.pictures is not None:
        return source.pictures
    try:
        shards = read_index(Path(str(source.shards)))["shards"]
    except UserError as error:
        raise UserError(
            f"{error}; or say pictures = true or false beside shards, to plan without them"
        ) from error
    return any(shard["pictures"] for shard in shards)


def plan(config: TrainConfig, given: Assumptions) -> dict[str, Any]:
    """All figures by name, in bytes, operations, seconds, dollars and tokens. Raises UserError for what cannot be."""
    model, gpu = model_of(config), GPUS[given.gpu]
    check_tensor(model, given.tensor)
    parts = given.gpus // given.tensor * config.accumulate
    if config.batch_size < parts:
        raise UserError(
            f"batch_size {config.batch_size} is too small for {given.gpus} GPUs that read {parts} parts of it"
        )
    work = step_work(config, model, given.caption)
    rows = math.ceil(work.positions / parts / config.sequence_length)
    part = mem.Part(
        rows * config.sequence_length, math.ceil(work.text_targets / parts), math.ceil(work.pictures / parts)
    )
    item = 2 if config.dtype == "bfloat16" else 4
    need = mem.memory(
        model, part, given.gpus // given.replicas, item, config.gradient_checkpointing, tensor=given.tensor
    )
    flops = step_flops(model, work)
    computed = flops * (4 / 3 if config.gradient_checkpointing else 1)
    seconds = flops / (given.gpus * gpu.flops * given.mfu)
    parameters = mem.sizes(model).total
    hours = seconds * config.steps / 3600
    price = gpu.price if given.price is None else given.price
    checkpoint = parameters * mem.CHECKPOINT_BYTES
    elements = model.image_height * model.image_width * model.image_channels
    return {
        "parameters": parameters,
        "rows_a_part": rows,
        "memory": need.to_dict(),
        "gpu_memory": gpu.memory,
        "fits": need.total <= 0.92 * gpu.memory,
        "step_positions": work.positions,
        "step_pictures": work.pictures,
        "step_flops": flops,
        "step_flops_computed": computed,
        "run_flops": flops * config.steps,
        "step_seconds": seconds,
        "tokens_per_second": work.positions / seconds,
        "days": hours / 24,
        "gpu_hours": hours * given.gpus,
        "dollars": hours * given.gpus * price,
        "checkpoint_bytes": checkpoint,
        "checkpoint_seconds": checkpoint / given.gpus / given.write,
        "model_bytes": parameters * 4,
        "run_tokens": work.positions * config.steps,
        "run_pictures": work.pictures * config.steps,
        "picture_bytes": elements * (1 if model.image_channels == 3 else 2),
    }


def table(p: dict[str, Any], given: Assumptions) -> list[tuple[str, str]]:
    """The plan for people: names and values."""
    m, size = p["memory"], 1e9
    need = f"{m['total'] / size:.1f} GB of {p['gpu_memory'] / size:.0f} GB"
    return [
        ("parameters", f"{p['parameters'] / 1e9:.3f} billion"),
        ("memory a GPU", need + ("" if p["fits"] else ": does NOT fit (accumulate more, or take more GPUs)")),
        ("  most is needed at", m["moment"]),
        ("  shards of weights, AdamW, average", f"{m['state'] / size:.2f} GB"),
        ("  gradients", f"{m['gradients'] / size:.2f} GB"),
        ("  gathered weights", f"{m['gathered'] / size:.2f} GB"),
        ("  kept for the backward pass", f"{m['kept'] / size:.2f} GB ({p['rows_a_part']} rows at a time)"),
        ("  numbers in hand", f"{m['working'] / size:.2f} GB"),
        ("tokens and patches a step", f"{p['step_positions']:,} with {p['step_pictures']:,} pictures"),
        ("operations a step", f"{p['step_flops']:.3e} (with recomputation {p['step_flops_computed']:.3e})"),
        ("operations of the run", f"{p['run_flops']:.3e}"),
        (f"at {given.mfu:.0%} MFU on {given.gpus} {given.gpu}",
         f"{p['tokens_per_second']:,.0f} tokens/s, {p['step_seconds']:.2f} s a step"),
        ("time", f"{p['days']:.1f} days, {p['gpu_hours']:,.0f} GPU hours"),
        ("cost", f"${p['dollars']:,.0f}"),
        ("checkpoint", f"{p['checkpoint_bytes'] / size:.1f} GB, {p['checkpoint_seconds']:.0f} s to write"),
        ("model folder (float32)", f"{p['model_bytes'] / size:.1f} GB"),
        ("data", f"{p['run_tokens'] / 1e9:,.1f} billion tokens and patches, {p['run_pictures'] / 1e6:,.1f} million "
                 f"pictures of {p['picture_bytes'] / 1024:.0f} KiB"),
    ]  # fmt: skip
