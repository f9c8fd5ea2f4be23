"""Whether a config continues the run of a checkpoint: what may differ, and what may not. Imports no mlx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError

MAY_CHANGE = re.compile(
    r"(output|tokenizer|init|log_every|valid_every|valid_batches|save_every|keep|best_by|patience|accumulate|compile"
    r"|gradient_checkpointing|low_ram|cache_limit)|sample\..*|data\.(valid|threads|cache_gib|check_images|skip_bad_rows|latents|autoencoder)\b.*"
    r"|data\.train\.\d+\.(rows|images|shards|pictures)"
)
"""Keys that may differ on resume without changing what is learned (files may have moved)."""


def check_same_run(
    then: Mapping[str, Any], now: Mapping[str, Any], path: Path, may_change: re.Pattern[str] = MAY_CHANGE
) -> None:
    """Compare two configs as nested plain data: that of the checkpoint `path`, and the one that is asked for.

    Raises UserError that names the first key, e.g. `optimizer.learning_rate`, that makes it another run.
    """
    old, new = flat(then), flat(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not may_change.fullmatch(key):
            raise UserError(
                f"{path}: was trained with {key} = {old.get(key)}, the config says {new.get(key)}; "
                "use the same config or another output folder"
            )


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted keys."""
    if not isinstance(data, (dict, list, tuple)):
        return {prefix: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    out: dict[str, Any] = {}
    for key, value in items:
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out
