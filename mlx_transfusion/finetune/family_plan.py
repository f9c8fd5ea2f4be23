"""What a fine-tune of a converted model takes, told from its config: no weight is allocated."""

from __future__ import annotations

from mlx.nn import Linear
from mlx.utils import tree_flatten

from mlx_transfusion.finetune.families import PARTS, with_targets
from mlx_transfusion.finetune.layers import targets
from mlx_transfusion.finetune.memory import FLOAT, QUANTISED_OVERHEAD, Estimate
from mlx_transfusion.model_io import build
from mlx_transfusion.models.family import FamilyConfig
from mlx_transfusion.training.config import TrainConfig


def estimate_family(config: TrainConfig, model: FamilyConfig, tokens: int) -> Estimate:
    """A coarse estimate in bytes for documents of `tokens` positions.

    Activations are counted as what goes into and comes out of every linear layer that is not always frozen, for each
    token; attention's scores are not.
    """
    size = 2 if config.dtype == "bfloat16" else FLOAT
    parts, whole = PARTS[model.model_type], build(model)
    linear = {name: m.weight for name, m in whole.named_modules() if isinstance(m, Linear)}
    moving = {name: w for name, w in linear.items() if name.split(".")[0] not in parts.frozen}
    flat = dict(tree_flatten(whole.parameters()))
    total = sum(value.size for value in flat.values())
    spec = config.adapter
    weights = total * size
    if spec is None:
        trained = sum(value.size for name, value in flat.items() if name.split(".")[0] not in parts.frozen)
        weights -= trained * size  # counted among the copies of what is trained
    else:
        spec = with_targets(spec, model.model_type)
        names = targets(whole, spec)
        trained = sum(spec.rank * sum(linear[name].shape) for name in names)
        if spec.quantize is not None:
            bits = spec.quantize + QUANTISED_OVERHEAD
            weights -= int(sum(linear[name].size for name in names) * (size - bits / 8))
    documents = -(-config.batch_size // config.accumulate)
    activations = documents * tokens * size * sum(sum(w.shape) for w in moving.values())
    own = trained * FLOAT
    return Estimate(weights, 3 * own, 2 * own, max(activations, 4 * own))
