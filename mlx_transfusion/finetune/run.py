"""A fine-tune from its settings to the finished adapter, and what `--check` reports instead."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_transfusion import lora
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.finetune.config import FinetuneConfig, train_config
from mlx_transfusion.finetune.data import ROWS, UserData, read_user_data, write_rows
from mlx_transfusion.finetune.families import PARTS, check_paints
from mlx_transfusion.finetune.family_plan import estimate_family
from mlx_transfusion.finetune.memory import Estimate, check_memory, estimate
from mlx_transfusion.lora_extract import base_name
from mlx_transfusion.model_files import write_json
from mlx_transfusion.model_io import load_config, read_config, special_ids
from mlx_transfusion.model_path import ADAPTER_CONFIG, display_name, is_adapter, resolve
from mlx_transfusion.models.family import FamilyConfig
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.best import FOLDER as BEST_FOLDER
from mlx_transfusion.training.config import TrainConfig
from mlx_transfusion.training.processes import is_main, wait_for_all
from mlx_transfusion.training.rows import ImageRef

AROUND = 2
"""BOS and EOS of a document."""
NOTHING_IDLE = "there is nothing to release: this model paints pixels, and every step needs all of it"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before training starts."""

    config: TrainConfig
    data: UserData
    estimate: Estimate
    tokens: list[int]
    """Of each caption or instruction."""

    def report(self) -> dict[str, Any]:
        """Counts, sizes, token lengths, what is skipped and what it takes, as plain data."""
        d, t = self.data, self.tokens or [0]
        return {
            "rows": d.count,
            "edits": d.edits,
            "valid_rows": len(d.rows.get("valid", [])),
            "pictures": sum(d.sizes.values()),
            "sizes": dict(d.sizes.most_common()),
            "modes": dict(d.modes.most_common()),
            "tokens": {"least": min(t), "mean": round(sum(t) / len(t), 1), "most": max(t)},
            "sequence_length": self.config.sequence_length,
            "skipped": d.skipped,
            "notes": d.notes,
            "memory_gb": {k: round(v / 1e9, 3) for k, v in self.estimate.parts().items()},
        }


def make_plan(config: FinetuneConfig, write: bool = True) -> Plan:
    """Read all data and work out the run; `write` puts the rows into the output folder, which training needs.

    Raises UserError for a model that cannot be fine-tuned, for data without a usable row, and for bad settings.
    """
    path = resolve(config.model)
    converted = read_config(path)[0]
    check_paints(converted.model_type, display_name(config.model, path))
    family = converted.model_type in PARTS
    model: Any = converted if family else load_config(config.model)
    _check_model(config, model)
    if family:  # a caption is a prompt, and nothing is learned about pictures that come first
        config = dataclasses.replace(config, caption_first=1.0)
    picture = model.layout.picture_tokens
    tokenizer = Tokenizer.load(path, special=special_ids(model))
    data = read_user_data(Path(config.data), config.caption)
    if config.low_ram and not family:
        config = dataclasses.replace(config, low_ram=False)
        data.notes.append(f"--low-ram: {NOTHING_IDLE}")
    target = Path(config.output) / "rows"
    rows = _places(data, target, write)
    tokens = [len(tokenizer.encode(text)) for text in data.texts]
    lengths = _lengths(data, tokenizer, picture)
    prior = past = None
    if config.prior is not None:
        past = read_user_data(Path(config.prior))
        prior = _places(past, target / "prior", write)["train"]
        lengths += _lengths(past, tokenizer, picture)
    if write:
        wait_for_all()
    longest = model.layout.max_position
    plan = train_config(config, longest, rows, prior, lengths)
    if family:  # prompts are longer than captions, and nothing is packed
        plan = dataclasses.replace(plan, sequence_length=longest)
        return Plan(plan, data, estimate_family(plan, model, max(lengths), _has_text(data, past)), tokens)
    return Plan(plan, data, estimate(plan, model, Counter(lengths)), tokens)


def finetune(
    config: FinetuneConfig, plan: Plan | None = None, resume: bool = True, ignore_memory: bool = False
) -> Path:
    """Train and return the folder that holds the result: an adapter, or a whole model after type "full".

    With validation data it is the best by validation, else the last. plan: of `make_plan`, when it is known already.
    Raises UserError for bad input and, unless `ignore_memory`, when the machine has too little memory.
    """
    from mlx_transfusion.training.trainer import train

    plan = plan or make_plan(config)
    if not ignore_memory:
        check_memory(plan.estimate, plan.config)
    last = train(plan.config, resume=resume)
    best = Path(config.output) / BEST_FOLDER
    chosen = best if plan.config.best_by and best.is_dir() else last
    if config.type == "full":
        return chosen
    if is_main():
        _export(chosen, Path(config.output), config.model)
    wait_for_all()
    return Path(config.output)


def _export(checkpoint: Path, target: Path, model: str) -> None:
    """Copy the adapter of a checkpoint to the output folder itself, its base's place made right."""
    temporary = target / f".{lora.ADAPTER_FILE}.partial"
    shutil.copyfile(checkpoint / lora.ADAPTER_FILE, temporary)
    temporary.replace(target / lora.ADAPTER_FILE)
    config = lora.read_adapter_config(checkpoint)
    write_json(target / ADAPTER_CONFIG, dataclasses.replace(config, model=base_name(model, target)).to_dict())


def _places(data: UserData, target: Path, write: bool) -> dict[str, tuple[Path, Path]]:
    """The jsonl file (written into `target`, or only named) and the pictures of each split.

    Of several processes one writes; they wait for it before they read.
    """
    if write and is_main():
        write_rows(data, target)
    used = [split for split in data.images if data.captions or data.rows[split]]
    return {split: (target / ROWS[split], data.images[split]) for split in used}


def _has_text(*folders: UserData | None) -> bool:
    """Whether there are rows of text alone."""
    splits = [rows for one in folders if one is not None for rows in one.rows.values()]
    return any(row.kind == "text" for rows in splits for row in rows)


def _check_model(config: FinetuneConfig, model: FamilyConfig) -> None:
    if is_adapter(resolve(config.model)):
        raise UserError(
            f"--model {config.model}: is a student or an adapter of another model: fine-tune that one (of "
            "emoji-2step it is emoji); the adapter then works on both"
        )
    if isinstance(model, ModelConfig) and model.image_channels != 3:
        raise UserError(
            f"--model {config.model}: makes latents, not pixels: only pixel models are fine-tuned"
        )


def _lengths(data: UserData, tokenizer: Tokenizer, picture: int) -> list[int]:
    """Positions of each training document, of which a picture takes `picture`."""
    if data.captions:
        return [AROUND + picture + len(tokenizer.encode(row["text"])) for row in data.captions]
    return [
        AROUND + sum(picture if isinstance(s, ImageRef) else len(tokenizer.encode(s)) for s in row.segments)
        for row in data.rows["train"]
    ]
