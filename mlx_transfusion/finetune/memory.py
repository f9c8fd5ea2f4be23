"""How much memory a training run will take, before it starts.

Peak = what stays (weights, optimiser, averages) + the larger of what a backward pass keeps and what an update needs.
The activations are counted array by array as the blocks of models/layers.py make them; attention in training keeps
its [T, T] scores, because no fused kernel has a derivative in MLX. benchmarks/finetune_memory.py compares this with
measured peaks.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.data import ROW_MULTIPLE, TOKEN_MULTIPLE

FLOAT = 4
QUANTISED_OVERHEAD = 1.0
"""Bits a weight for scales and biases: two float32 for each group of 64."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run takes."""

    weights: int
    """The model's, as they lie in memory while it is trained."""
    trained: int
    """Copies of what is trained: weights, average and gradient."""
    optimizer: int
    activations: int
    """What one backward pass keeps, or an update makes anew, whichever is more."""
    painting: int = 0
    """The model that previews are painted with, between the steps."""
    encoding: int = 0
    """With `low_ram` what encodes all pictures, before anything else is in memory."""
    idle: int = 0
    """Of the weights, what `low_ram` would keep out of memory."""
    checkpoints: bool = True
    """Whether there is gradient checkpointing for this model."""

    @property
    def total(self) -> int:
        """The peak, bytes."""
        steps = self.weights + self.trained + self.optimizer + max(self.activations, self.painting)
        return max(self.encoding, steps)

    def parts(self) -> dict[str, int]:
        """The parts and the total by name."""
        return {
            "weights": self.weights,
            "trained": self.trained,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "painting": self.painting,
            "encoding": self.encoding,
            "total": self.total,
        }


WIDTHS, WIDTHS_ADAPTED = 9, 10
"""Arrays of the model's width that a block keeps for each token: inputs, norms, queries, keys, values and outputs."""
FEED_FORWARD = {"relu": 4, "silu": 6}
"""Arrays of the feed-forward width that a block keeps for each token, by its gate."""
SCORES = 2
"""Arrays [heads, T, T] that a block keeps for each row: scores and their softmax."""
RECOMPUTED = 2.6
"""Blocks in full beside what goes in and out of all with gradient checkpointing: one made again, its gradients."""
LOGITS = 3
"""Arrays [positions, vocabulary] of the language-model loss: logits, their softmax and its gradient."""


def estimate(config: TrainConfig, model: ModelConfig, lengths: Counter[int]) -> Estimate:
    """What a run takes, in bytes: a model of our own family, trained whole or by an adapter.

    lengths: how many documents have how many positions.
    """
    size = 2 if config.dtype == "bfloat16" else FLOAT
    matrices, rest = parameter_counts(model)
    spec = config.adapter
    if spec is None:
        # Weights, average and gradient; the update makes new weights and averages while the old ones are there.
        trained, weights = matrices + rest, 0
    else:
        trained = adapter_count(config, model)
        bits = 8 * size if spec.quantize is None else spec.quantize + QUANTISED_OVERHEAD
        weights = int(matrices * bits / 8) + rest * size
    own = trained * FLOAT
    return Estimate(
        weights=weights,
        trained=3 * own,
        optimizer=2 * own,
        activations=max(_activations(config, model, lengths, size), 4 * own),
        painting=_painting(config, model) if config.sample.every else 0,
    )


def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """Parameters in what a quantised base stores in few bits (embedding, head, blocks), and all others."""
    d, e = model.hidden_size, model.head_dim
    block = sum(rows * columns for rows, columns in _matrices(model).values())
    norms = 2 * d + (2 * e if model.qk_norm else 0)
    text = 2 * model.vocab_size * d
    patches = 2 * model.patch_dim * d + 4 * d * d
    return model.num_hidden_layers * block + text, model.num_hidden_layers * norms + patches


def _matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape of each matrix of a block by its name in the block."""
    d, f, kv = model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim
    return {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip


def adapter_count(config: TrainConfig, model: ModelConfig) -> int:
    """Parameters of the adapter of a run."""
    spec = config.adapter
    assert spec is not None
    blocks = model.num_hidden_layers
    first = 0 if spec.layers < 0 else max(0, blocks - spec.layers)
    total = 0
    for i in range(first, blocks):
        for name, (rows, columns) in _matrices(model).items():
            if any(fnmatchcase(f"layers.{i}.{name}", pattern) for pattern in spec.targets):
                total += spec.rank * (rows + columns) + (rows if spec.type == "dora" else 0)
    return total


def _activations(config: TrainConfig, model: ModelConfig, lengths: Counter[int], size: int) -> int:
    """Bytes that the backward pass of one part of a batch keeps."""
    rows, text = _packed(config, model, lengths)
    t, d, f = config.sequence_length, model.hidden_size, model.intermediate_size
    tokens = rows * t
    dora = config.adapter is not None and config.adapter.type == "dora"
    widths = WIDTHS if config.adapter is None else WIDTHS_ADAPTED
    block = tokens * ((widths + 3 * dora) * d + (FEED_FORWARD[model.hidden_act] + 2 * dora) * f)
    block += SCORES * rows * model.num_attention_heads * t * t
    kept = block * model.num_hidden_layers
    if config.gradient_checkpointing:
        kv = model.kv_heads * model.head_dim
        kept = int(tokens * (d + 2 * kv) * model.num_hidden_layers + RECOMPUTED * block)
    return size * (kept + LOGITS * text * model.vocab_size)


def _painting(config: TrainConfig, model: ModelConfig) -> int:
    """Bytes of previews: a float32 copy of the base under an adapter, and the passes of all prompts at once."""
    matrices, rest = parameter_counts(model)
    spec = config.adapter
    copies = 0 if spec is None else 2 if spec.modality == "image" else 1
    n = model.patches_per_image
    tokens = 2 * len(config.sample.prompts) * n  # with and without the prompt, for guidance
    widths = model.intermediate_size * 3 + model.hidden_size * 4 + model.num_attention_heads * n
    cache = 2 * tokens * model.hidden_size * model.num_hidden_layers
    return FLOAT * (copies * (matrices + rest) + tokens * widths + cache)


def _packed(config: TrainConfig, model: ModelConfig, lengths: Counter[int]) -> tuple[int, int]:
    """Rows and text-loss positions of one part of a batch of average documents, as training pads them."""
    documents = -(-config.batch_size // config.accumulate)
    count = sum(lengths.values())
    mean = sum(length * n for length, n in lengths.items()) / count
    fit = max(1, int(config.sequence_length // mean))
    rows = sequence.bucket(-(-documents // fit), ROW_MULTIPLE)
    words = documents * max(1.0, mean - model.patches_per_image - 1)
    return rows, sequence.bucket(int(words), TOKEN_MULTIPLE)


def check_memory(found: Estimate, config: TrainConfig, available: int | None = None) -> None:
    """Raises UserError with the flags that would help when a run takes more than the machine has.

    available: bytes; None asks the machine.
    """
    room = machine_memory() if available is None else available
    if room is None or found.total <= room:
        return
    raise UserError(
        f"this needs about {found.total / 1e9:.1f} GB and the machine has {room / 1e9:.1f} GB: try "
        f"{', '.join(suggestions(found, config))}; or --ignore-memory"
    )


def suggestions(found: Estimate, config: TrainConfig) -> list[str]:
    """Flags that make a run smaller, the one that helps most first."""
    options: list[tuple[int, str]] = []
    if found.checkpoints and not config.gradient_checkpointing:
        options.append((found.activations * 2 // 3, "--grad-checkpoint"))
    if config.batch_size > config.accumulate:
        parts = min(config.batch_size, 2 * config.accumulate)
        options.append((found.activations // 2, f"--accumulate {parts}"))
        options.append((found.activations // 2 - 1, f"--batch-size {max(1, config.batch_size // 2)}"))
    if config.adapter is None:
        options.append((found.trained + found.optimizer, "--type lora"))
    elif config.adapter.quantize is None:
        options.append((found.weights * 3 // 4, "--quantize 4"))
    if found.idle:
        options.append((found.idle, "--low-ram"))
    return [text for _, text in sorted(options, key=lambda pair: -pair[0])]


def machine_memory() -> int | None:
    """Bytes that a run may use: the GPU's recommended working set, else what is free; None when unknown."""
    import mlx.core as mx

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
