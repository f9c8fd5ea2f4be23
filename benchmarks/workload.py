"""What both peers are asked to do, and how a call is timed. Standard library only: either peer imports it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

STEP, PICTURE = "training step", "guided picture"


@dataclass(frozen=True)
class Workload:
    """Sizes of the model, of a training batch and of a picture."""

    width: int = 256
    layers: int = 8
    heads: int = 4
    feed_forward: int = 682
    """Inner width of the gated feed-forward layer; transfusion-pytorch takes int(width * 8 / 3)."""
    gate: str = "silu"
    """Activation of that layer's gate in our model, "silu" or "relu"; theirs is gelu."""
    vocabulary: int = 2048
    """Rows of the text embedding and of the head, special tokens included."""
    image_size: int = 32
    patch_size: int = 4
    channels: int = 3
    text_tokens: int = 24
    """Tokens of a caption, without the special ones around it and around the picture."""
    batch: int = 16
    steps: int = 16
    guidance: float = 3.0
    warm_up: int = 2
    """Untimed training steps before the timed ones; of pictures there is one."""
    repeats: int = 2
    """Timed calls of each measurement in a round."""

    @property
    def image_tokens(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch_size**2

    @property
    def positions(self) -> int:
        """Length of a training sequence: caption, picture, and our BOS, BOI, EOI and EOS."""
        return self.text_tokens + self.image_tokens + 4

    def to_json(self) -> str:
        """As an argument of a worker."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


def timed(call: Callable[[], object], warm_up: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
