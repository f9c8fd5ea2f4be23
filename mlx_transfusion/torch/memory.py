"""Memory of one process of a sharded run, from the config: what `plan` prints.

Weights, gradients, both moments of AdamW and the average are float32 shards: 20 bytes a parameter over all processes.
On top come the gathered weights of the blocks in hand and what the backward pass keeps. Four moments can need most:
the loss over the vocabulary, the first block of the backward pass, its end, when the embedding's gradient is sent,
and the optimiser's step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlx_transfusion.config import ModelConfig

STATE_BYTES = 20
"""A parameter: weight, gradient, two moments, average, 4 bytes each."""
CHECKPOINT_BYTES = 16
"""A parameter in a checkpoint: all of these but the gradient."""


@dataclass(frozen=True)
class Part:
    """What one process computes on at a time: one part of a step."""

    positions: int
    text_targets: int
    pictures: int
    row_length: int = 0
    """T of a dense mask of booleans; 0 for a block mask."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the moment that needs most, and which moment that is."""

    moment: str
    """"loss", "backward", "end of backward" or "optimizer"."""
    state: float
    """Shards of weights, optimiser and average."""
    gradients: float
    """Shards of gradients that are there, and those of whole blocks that are on their way to them."""
    gathered: float
    """Whole weights."""
    kept: float
    """What the backward pass needs of the forward pass."""
    working: float
    """Numbers in hand."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.gradients + self.gathered + self.kept + self.working

    def to_dict(self) -> dict[str, Any]:
        """The parts and the total, in bytes."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    block: int
    unet: int
    """Patch encoder and decoder."""
    embedding: int
    """One of the two matrices of vocabulary by width."""
    total: int


def sizes(config: ModelConfig) -> Sizes:
    """Parameters of a model by where they stand."""
    c, d, e = config, config.hidden_size, config.head_dim
    block = 2 * d * e * (c.num_attention_heads + c.kv_heads) + 3 * d * c.intermediate_size + 2 * d
    block += 2 * e if c.qk_norm else 0
    angle = d * (2 * c.time_frequencies + 1) + d * (d + 1)
    angle += d * (2 * c.time_frequencies + 1) if c.guidance_condition else 0
    patches = c.patches_per_image * d if c.patch_positions == "learned" else 0
    patches += c.patch_dim * (d + 1) if c.patch_skip else 0
    patches += unet_parameters(c) if c.patch_encoder == "unet" else c.patch_dim * d * 2 + d + c.patch_dim
    embedding = c.vocab_size * d
    return Sizes(block, patches, embedding, c.num_hidden_layers * block + 2 * embedding + d + angle + patches)


def unet_parameters(config: ModelConfig) -> int:
    """Parameters of both halves of the U-Net."""
    c, d, features = config, config.hidden_size, 4 * config.unet_channels
    channels = [c.unet_channels * 2**i for i in range(c.patch_size.bit_length())]

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        return outputs * (inputs * kernel * kernel + 1)

    def block(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return (
            2 * inputs
            + conv(inputs, outputs)
            + conv(outputs, outputs)
            + shortcut
            + (features + 1) * 2 * outputs
        )

    total = 2 * (d + 1) * features + conv(c.image_channels, channels[0]) + conv(channels[0], c.image_channels)
    total += 2 * channels[-1] + 2 * channels[0]  # norm_out, conv_norm_out
    total += d * (channels[-1] + 1) + channels[-1] * (d + 1)  # proj_out, proj_in
    for i, width in enumerate(channels):
        total += block(channels[max(0, i - 1)], width) + (c.unet_blocks - 1) * block(width, width)
        total += c.unet_blocks * block(2 * width, width)
        if i < len(channels) - 1:
            total += conv(width, width) + conv(channels[i + 1], width)
    return total


def memory(
    config: ModelConfig,
    part: Part,
    processes: int,
    item: int = 2,
    recompute: bool = True,
    fused: bool = True,
    tensor: int = 1,
) -> Memory:
    """Bytes of one of `processes` that share a model.

    item: bytes of a number in the arithmetic (2: bfloat16). recompute: every block's activations are computed again
    in the backward pass. fused: optimiser and norms are single kernels, as on CUDA; on a CPU each leaves a copy.
    tensor: neighbours that share every block, and have the rest of the model alike.
    """
    c, n = config, sizes(config)
    blocks = c.num_hidden_layers * n.block
    shard = (blocks + (n.total - blocks) * tensor) / processes
    state = CHECKPOINT_BYTES * shard
    gradients, outside = 4 * shard, 2 * n.embedding
    block = part.positions * item * block_numbers(c, fused, tensor) + _mask_bytes(part, item, 1)
    layers = c.num_hidden_layers
    kept: float = layers * (part.positions * c.hidden_size * item if recompute else block)
    kept += part.pictures * _picture_bytes(c, item) + part.positions * (
        3 * c.hidden_size * item + part.row_length
    )
    gathered = item * (2 * n.block / tensor + outside)
    loss = part.text_targets * (12 * c.vocab_size + 2 * item * c.hidden_size)
    backward = part.positions * item * (3 * c.intermediate_size / tensor + 2 * c.hidden_size)
    sent = n.block / tensor * (item + 4) + n.embedding * item
    moments = [
        Memory("loss", state, n.embedding * item, gathered, kept, loss),
        Memory("backward", state, sent, gathered, kept, backward + (block if recompute else 0)),
        Memory("end of backward", state, gradients + outside * (item + 4), item * outside, 0, 0),
        Memory("optimizer", state, gradients, 0, 0, 0 if fused else gradients),
    ]
    return max(moments, key=lambda m: m.total)


def block_numbers(config: ModelConfig, fused: bool = True, tensor: int = 1) -> int:
    """Numbers a position that one block keeps for its backward pass.

    Input and output of both norms, q, k, v, attention's output in two layouts, and four of the gated layer; of all
    but the first, what one of `tensor` processes has.
    """
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.kv_heads * c.head_dim
    heads = 3 * queries + 2 * keys + (0 if fused or not c.qk_norm else 2 * (queries + keys))
    return (4 if fused else 6) * c.hidden_size + (heads + 4 * c.intermediate_size) // tensor


def _mask_bytes(part: Part, item: int, layers: int) -> int:
    """A dense mask as numbers, which the CPU's attention makes for itself and keeps."""
    return part.positions * part.row_length * item * layers


def _picture_bytes(config: ModelConfig, item: int) -> float:
    """What is kept of one picture by its patch encoder and decoder: patches, tokens, the U-Net's activations."""
    c = config
    elements = c.patches_per_image * c.patch_dim
    flat = 5 * 4 * elements + 2 * item * c.patches_per_image * c.hidden_size
    if c.patch_encoder == "linear":
        return flat
    area = c.image_height * c.image_width
    total = 0.0
    for i in range(c.patch_size.bit_length()):
        width = c.unet_channels * 2**i
        # A residual block keeps about nine pictures of its width; one of the way up reads twice its width.
        total += (area >> 2 * i) * width * c.unet_blocks * (9 + 13)
    return flat + item * total
