"""The autoencoder of Wan 2.1 by its official names (`Wan2.1_VAE.pth`): a part of Show-o2."""

from __future__ import annotations

from mlx_transfusion.models.wan_vae import WanConfig

from .table import CONV3D, Entry, Op, conv2d, reshape, unused, vector

FILMS = "convolutions between the frames of a film, which a single picture does not pass"


def entries(config: WanConfig) -> list[Entry]:
    """Every tensor of Wan2.1_VAE.pth."""
    z, n = config.z_dim, config.num_res_blocks
    down, up = config.encoder_stages, config.decoder_stages
    low, high = down[-1][1], up[-1][1]
    return [
        *_conv3d("conv1", "conv1", 2 * z, 2 * z, 1),
        *_conv3d("conv2", "conv2", z, z, 1),
        *_coder("encoder", (3, config.dim), low, (low, 2 * z)),
        *_stages("encoder.downsamples", "encoder.stages", down, n, halves=True),
        *_coder("decoder", (z, low), low, (high, 3)),
        *_stages("decoder.upsamples", "decoder.stages", up, n + 1, halves=False),
    ]


def _coder(name: str, first: tuple[int, int], middle: int, last: tuple[int, int]) -> list[Entry]:
    """All but the stages of one direction."""
    m = f"{name}.middle"
    return [
        *_conv3d(f"{name}.conv1", f"{name}.conv1", first[1], first[0], 3),
        *_residual(f"{m}.0", f"{m}.0", middle, middle),
        Entry(f"{m}.1.norm.gamma", f"{m}.1.norm.gamma", (middle, 1, 1), reshape(middle)),
        *_matrix(f"{m}.1.to_qkv", 3 * middle, middle),
        *_matrix(f"{m}.1.proj", middle, middle),
        *_residual(f"{m}.2", f"{m}.2", middle, middle),
        _gamma(f"{name}.head.0", f"{name}.norm", last[0]),
        *_conv3d(f"{name}.head.2", f"{name}.conv2", last[1], last[0], 3),
    ]


def _stages(
    source: str, target: str, stages: list[tuple[int, int]], blocks: int, halves: bool
) -> list[Entry]:
    """Residual blocks of each size and what leads to the next; films have a convolution more from the second on."""
    table: list[Entry] = []
    at = 0
    for i, (inputs, outputs) in enumerate(stages):
        for j in range(blocks):
            table += _residual(f"{source}.{at}", f"{target}.{at}", outputs if j else inputs, outputs)
            at += 1
        if i == len(stages) - 1:
            break
        after = outputs if halves else outputs // 2
        table += conv2d(f"{source}.{at}.resample.1", f"{target}.{at}.conv", after, outputs, 3)
        # A film is shortened in the last halvings, and lengthened in the first doublings.
        if i > 0 if halves else i < len(stages) - 2:
            wide = outputs if halves else 2 * outputs
            table.append(unused(f"{source}.{at}.time_conv.weight", (wide, outputs, 3, 1, 1), FILMS))
            table.append(unused(f"{source}.{at}.time_conv.bias", (wide,), FILMS))
        at += 1
    return table


def _residual(source: str, target: str, inputs: int, outputs: int) -> list[Entry]:
    table = [
        _gamma(f"{source}.residual.0", f"{target}.norm1", inputs),
        *_conv3d(f"{source}.residual.2", f"{target}.conv1", outputs, inputs, 3),
        _gamma(f"{source}.residual.3", f"{target}.norm2", outputs),
        *_conv3d(f"{source}.residual.6", f"{target}.conv2", outputs, outputs, 3),
    ]
    if inputs == outputs:
        return table
    return table + _conv3d(f"{source}.shortcut", f"{target}.shortcut", outputs, inputs, 1)


def _conv3d(source: str, target: str, out: int, channels: int, size: int) -> list[Entry]:
    shape = (out, channels, size, size, size)
    return [
        Entry(f"{source}.weight", f"{target}.weight", shape, CONV3D),
        vector(f"{source}.bias", f"{target}.bias", out),
    ]


def _matrix(name: str, out: int, width: int) -> list[Entry]:
    """A 1x1 convolution that is a matrix of ours."""
    return conv2d(name, name, out, width, 1, op=reshape(out, width))


def _gamma(source: str, target: str, width: int) -> Entry:
    return Entry(f"{source}.gamma", f"{target}.gamma", (width, 1, 1, 1), Op(merge=(width,)))
