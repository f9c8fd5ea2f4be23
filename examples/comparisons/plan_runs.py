"""What is compared: tables of variants, and the training config of each run with as many steps as the budget buys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_transfusion.config import ModelConfig, from_dict
from mlx_transfusion.errors import UserError
from mlx_transfusion.models.discrete_config import DiscreteConfig
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.toml_file import read_toml
from mlx_transfusion.training.config import TrainConfig, load_train_config
from mlx_transfusion.training.shape import mean_step_flops, run_shape

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """comparisons.toml: what all tables share."""

    budget_gflop: float
    """Training operations of a run in 1e9, forward and backward."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    variant: str
    label: str
    against: str | None = None
    """Variant that the line is compared with."""
    paper: tuple[float, ...] = ()
    """The paper's numbers, of the table's `paper_columns`."""
    family: str | None = None
    """Whose power law the line belongs to, in a table of several budgets."""


@dataclass(frozen=True)
class Table:
    """A file of tables/."""

    title: str
    rows: tuple[Row, ...]
    measures: tuple[str, ...]
    """Names of `measure_run.MEASURES`."""
    paper_columns: tuple[str, ...] = ()
    serving: bool = False
    """Whether the time of painting is measured too."""
    paper_ratios: tuple[float, ...] = ()
    """The paper's parity ratios, of `measures`; nan where it has none. Not empty: two families at several budgets."""


@dataclass(frozen=True)
class Variant:
    """A file of variants/: what it changes, as "key.path=value"."""

    sets: tuple[str, ...]
    base: Path
    """What is changed: base.toml, or what its key `base` names."""
    budget_gflop: float | None
    """In the place of that of comparisons.toml."""


@dataclass(frozen=True)
class Run:
    """A variant trained with a seed."""

    variant: str
    seed: int
    base: Path
    sets: tuple[str, ...]
    """What `mlx-transfusion train BASE --set` takes to repeat it."""
    config: TrainConfig
    budget: float
    """Operations it may take, in 1e9."""
    gflop: float
    """Operations it takes: those of a whole number of steps."""

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.variant}-seed{self.seed}"


def read_plan(folder: Path = FOLDER) -> Plan:
    """Raises UserError for a bad file."""
    return from_dict(Plan, read_toml(folder / "comparisons.toml", "plan"), "comparisons.toml")


def read_table(name: str, folder: Path = FOLDER) -> Table:
    """tables/NAME.toml. Raises UserError for an unknown name and a bad file."""
    known = table_names(folder)
    if name not in known:
        raise UserError(f'table "{name}" is unknown, expected one of {", ".join(known)}')
    return from_dict(Table, read_toml(folder / "tables" / f"{name}.toml", "table"), f"{name}.toml")


def table_names(folder: Path = FOLDER) -> list[str]:
    """All tables there are."""
    return sorted(p.stem for p in (folder / "tables").glob("*.toml"))


def plan_run(variant: str, seed: int, plan: Plan, output: Path, folder: Path = FOLDER) -> Run:
    """The run of a variant: base.toml, what variants/ says, and the steps that the budget pays for.

    The budget is that of comparisons.toml, unless the variant has a `budget_gflop` of its own.

    Raises UserError for an unknown variant and for bad keys.
    """
    found = read_variant(variant, folder)
    config = load_train_config(found.base, list(found.sets))
    budget, gflop = found.budget_gflop or plan.budget_gflop, _step_gflop(found.base, found.sets)
    steps = max(1, round(budget / gflop))
    sets = (*found.sets, f"steps={steps}", f"seed={seed}")
    name = output / f"{variant}-seed{seed}"
    config = dataclasses.replace(config, steps=steps, seed=seed, output=str(name))
    return Run(variant, seed, found.base, sets, config, budget, gflop * steps)


def read_variant(variant: str, folder: Path = FOLDER) -> Variant:
    """variants/NAME.toml. Raises UserError for an unknown variant."""
    file = folder / "variants" / f"{variant}.toml"
    if not file.is_file():
        raise UserError(f'variant "{variant}" is unknown: there is no {file.name} in variants/')
    data = read_toml(file, "variant")
    base, budget = folder / data.pop("base", "base.toml"), data.pop("budget_gflop", None)
    return Variant(tuple(f"{key}={json.dumps(value)}" for key, value in _flat(data)), base, budget)


def runs_of(table: Table, plan: Plan, output: Path, folder: Path = FOLDER) -> Iterator[Run]:
    """All runs of a table, seed by seed, so that an interrupted table has whole rows of the first seeds."""
    for seed in plan.seeds:
        for row in table.rows:
            yield plan_run(row.variant, seed, plan, output, folder)


def model_of(variant: str, folder: Path = FOLDER) -> ModelConfig | DiscreteConfig:
    """The model that a variant trains. Raises UserError as `plan_run`."""
    found = read_variant(variant, folder)
    config = load_train_config(found.base, list(found.sets))
    return run_shape(config, Tokenizer.load(config.tokenizer))


@cache
def _step_gflop(base: Path, sets: tuple[str, ...]) -> float:
    """Operations in 1e9 of a mean step: what is padding or hidden by the mask does not count."""
    return mean_step_flops(load_train_config(base, list(sets))) / 1e9


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
