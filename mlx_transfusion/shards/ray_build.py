"""The build on a Ray cluster: Ray Data maps the same function over the inputs, on all machines of the cluster.

All of them see inputs, tokenizer, autoencoder and the folder of shards under the same paths (a shared file system).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.shards.build import Record, Runner, Unit
from mlx_transfusion.shards.shard import build_shard

FAULT = "fault"


def on_ray() -> Runner:
    """Runs units as tasks of Ray Data, one CPU each. Raises UserError when Ray is not installed."""
    try:
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'mlx-transfusion[ray]'") from error

    def run(units: Sequence[Unit]) -> Iterator[Record]:
        if not ray.is_initialized():
            ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, else one on this machine
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [{"unit": i} for i in range(len(units))]
        # A block for each unit, so that tasks are as small as the work that can be shared.
        data = ray.data.from_items(items, override_num_blocks=len(items))
        for row in data.map(_Task(units), num_cpus=1).iter_rows():
            record = json.loads(row["record"])
            if FAULT in record:
                raise UserError(record[FAULT])
            yield record

    return run


class _Task:
    """A unit's record, or what was wrong with its input: an exception would arrive as Ray's own."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"record": json.dumps(build_shard(*self._units[row["unit"]]))}
        except UserError as error:
            return {"record": json.dumps({FAULT: str(error)})}
