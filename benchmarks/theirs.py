"""Worker: measures transfusion-pytorch in this process and prints one JSON object. `compare.py` starts it.

It runs in whatever Python has torch and transfusion-pytorch and needs nothing of ours.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from workload import PICTURE, STEP, Workload, timed

PACKAGE, VERSION = "transfusion-pytorch", "0.20.0"
OWN_IDS = 3 + 2 + 1 + 128
"""Token ids that the library adds to the text's: sos, eos and null, two for a modality, meta, characters."""


def check_version() -> None:
    """Exit with one line unless the version that the numbers are about is installed."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "none"
    if found != VERSION:
        sys.exit(
            f"error: {sys.executable} has {PACKAGE} {found}, expected {VERSION}: pip install torch "
            f"{PACKAGE}=={VERSION}, or name another Python with --peer-python"
        )


def measure(workload: Workload, threads: int) -> dict[str, Any]:
    """Seconds of every timed call, and what was measured."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import torch
    from loguru import logger
    from transfusion_pytorch import Transfusion

    w = workload
    logger.remove()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if w.feed_forward != int(w.width * 4 * 2 / 3):
        raise ValueError(f"transfusion-pytorch cannot have a feed-forward layer of {w.feed_forward}")
    model = Transfusion(
        num_text_tokens=w.vocabulary - OWN_IDS,
        dim_latent=w.patch_dim,
        modality_default_shape=(w.image_tokens,),
        prob_uncond=0.0,
        transformer={"dim": w.width, "depth": w.layers, "dim_head": w.width // w.heads, "heads": w.heads},
    )
    shapes: list[torch.Size] = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def captions(count: int) -> torch.Tensor:
        return torch.randint(0, w.vocabulary - OWN_IDS, (count,))

    # sos, meta, the digits of the shape, som, eom and eos stand around it: all in all as many as ours.
    text = w.positions - w.image_tokens - 5 - len(str(w.image_tokens))
    batch = [[captions(text), torch.randn(w.image_tokens, w.patch_dim)] for _ in range(w.batch)]

    def step() -> None:
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {STEP: timed(step, w.warm_up, w.repeats)}
    positions = list(shapes[-1][:2])
    options: dict[str, Any] = {
        "force_modality_at_start": 0,
        "modality_steps": w.steps,
        "cfg_scale": w.guidance,
        "max_length": w.image_tokens - 1,  # so that it stops after the picture
        "return_unprocessed_modalities": True,
    }
    prompt = captions(w.text_tokens)
    paint = {
        f"{PICTURE}, sample": lambda: model.sample(prompt=prompt, **options),
        f"{PICTURE}, sample_many": lambda: model.sample_many(prompts=[prompt], **options),
    }
    passes = {}
    for name, call in paint.items():
        shapes.clear()
        call()
        passes[name] = len(shapes)
        seconds[name] = timed(call, 0, w.repeats)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "positions": positions,
        "passes": passes,
        "versions": {PACKAGE: VERSION, "torch": torch.__version__},
    }


if __name__ == "__main__":
    import json

    check_version()
    print(json.dumps(measure(Workload.from_json(sys.argv[1]), int(sys.argv[2]))))
