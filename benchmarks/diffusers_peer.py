"""Worker: decoding an AutoencoderKL and the arithmetic of a sampler, by `ours` or by `diffusers`; prints JSON.

The autoencoder has Stable Diffusion's shape at a quarter of its width and random weights: 4 pictures of 64x64 pixels
from latents of 8x8. The sampler is DPM-Solver++(2M), 16 steps on 64 patches of 48 numbers, with a network that costs
nothing: what is left is the sampler's own time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from workload import timed

CHANNELS = (32, 64, 128, 128)
DECODE, SAMPLER = "decode 4 pictures", "16 steps of the sampler"


def ours() -> dict[str, Callable[[], object]]:
    import mlx_transfusion  # noqa: F401  # isort: skip  (before mlx, for which it loads a BLAS)
    import mlx.core as mx

    from mlx_transfusion.models.autoencoder import AutoencoderKL
    from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
    from mlx_transfusion.sampling import angle_schedule, dpmpp_2m

    mx.set_default_device(mx.cpu)
    model = AutoencoderKL(AutoencoderConfig(block_out_channels=CHANNELS))
    mx.eval(model.parameters())
    latents, x = mx.random.normal((4, 8, 8, 4)), mx.random.normal((1, 64, 48))
    angles = angle_schedule(16)

    def velocity(y: mx.array, angle: float) -> mx.array:
        mx.eval(y)
        return y

    return {
        DECODE: lambda: mx.eval(model.decode(latents)),
        SAMPLER: lambda: mx.eval(dpmpp_2m(velocity, x, angles)),
    }


def diffusers(threads: int) -> dict[str, Callable[[], object]]:
    import diffusers as peer
    import torch

    torch.set_num_threads(threads)
    size = len(CHANNELS)
    # Its module makes these names when they are asked for, which a type checker does not see.
    made: Any = peer
    model = made.AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * size,
        up_block_types=("UpDecoderBlock2D",) * size,
    ).eval()
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(1, 64, 48)
    scheduler = made.DPMSolverMultistepScheduler()

    @torch.no_grad()
    def decode() -> None:
        model.decode(latents)

    def sample() -> None:
        scheduler.set_timesteps(16)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample

    return {DECODE: decode, SAMPLER: sample}


def measure(side: str, threads: int) -> dict[str, Any]:
    """Seconds of every timed call."""
    cases = ours() if side == "ours" else diffusers(threads)
    return {"seconds": {name: timed(call, 2, 5) for name, call in cases.items()}}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
