"""What `generate` paints, and under which file names."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_transfusion.cli import options
from mlx_transfusion.errors import UserError
from mlx_transfusion.settings import GenerationSettings


@dataclass(frozen=True)
class Job:
    """What to paint: picture i from prompts[i] and seeds[i]."""

    prompts: list[str]
    seeds: list[int]
    settings: GenerationSettings
    keep: int | None = None
    """Write this picture only (one row of a batch, see `job_from`)."""
    size: tuple[int, int] | None = None
    """(width, height) of the picture that is repeated."""
    model: str | None = None
    model_hash: str | None = None
    several_prompts: bool = False
    several_seeds: bool = False


def new_job(prompts: list[str], seeds: list[int], settings: GenerationSettings) -> Job:
    """Every prompt with every seed."""
    return Job(
        [p for p in prompts for _ in seeds], seeds * len(prompts), settings,
        several_prompts=len(prompts) > 1, several_seeds=len(seeds) > 1,
    )  # fmt: skip


def job_from(file: Path, flags: dict[str, Any], batch_size: int | None) -> Job:
    """The job that repeats a picture. A row of a batch is repeated in a batch of that shape, in its row."""
    from mlx_transfusion.images import read_record
    from mlx_transfusion.records import settings_from_record

    record = read_record(file)
    recorded = settings_from_record(record, str(file))
    settings = options.image_settings(recorded, **flags)
    if batch_size is not None:
        settings = replace(settings, batch_size=batch_size)
    exact = settings == recorded
    settings.check()
    count = settings.batch_size if exact else 1
    return Job(
        [str(record["prompt"])] * count,
        [int(record["seed"])] * count,
        settings,
        keep=int(record["batch"]["row"]) if exact else 0,
        size=_size(record),
        model=str(record.get("model")),
        model_hash=str(record.get("model_hash")),
    )


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    width, height = record.get("width"), record.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompt, or the lines of a prompt file that are not blank. Raises UserError when there is none."""
    if prompt is not None:
        if not prompt.strip():
            raise UserError("the prompt is empty: say what the picture shows")
        return [prompt]
    assert file is not None
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {file}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {file}: not UTF-8 text") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {file}: holds no prompt: write one a line")
    return prompts


def choose_seeds(seeds: list[int], count: int | None) -> list[int]:
    """The seeds of one prompt: those given, or `count` in a row from the one given or from a random one."""
    if count is not None and count < 1:
        raise UserError(f"--num-images is {count}: use at least 1")
    if len(seeds) > 1 and count not in (None, len(seeds)):
        raise UserError(f"--num-images {count} with {len(seeds)} seeds: give one --seed, or leave it out")
    if len(set(seeds)) < len(seeds):
        raise UserError("a --seed is given twice: it would paint the same picture again")
    if len(seeds) > 1:
        return seeds
    first = seeds[0] if seeds else secrets.randbelow(1 << 32)
    return list(range(first, first + (count or 1)))


class Files:
    """File names of a job's pictures."""

    def __init__(self, job: Job, output: Path, overwrite: bool) -> None:
        self._job, self._output, self._overwrite = job, output, overwrite
        self._taken: set[Path] = set()

    def picture(self, index: int) -> Path:
        """NAME.png, with _prompt_K and _seed_S where there are several."""
        return self._free(self._output.stem + self._marks(index))

    def preview(self, index: int, step: int) -> Path:
        """The picture's name with _step_K."""
        return self._free(f"{self._output.stem}{self._marks(index)}_step_{step:03d}")

    def grid(self) -> Path:
        """NAME_grid.png."""
        return self._free(f"{self._output.stem}_grid")

    def _marks(self, index: int) -> str:
        job, marks = self._job, ""
        if job.several_prompts:
            distinct = len(set(job.seeds))
            marks += f"_prompt_{index // distinct + 1}"
        if job.several_seeds:
            marks += f"_seed_{job.seeds[index]}"
        return marks

    def _free(self, stem: str) -> Path:
        from mlx_transfusion.images import free_path

        path = self._output.with_name(f"{stem}.png")
        path = path if self._overwrite else free_path(path, self._taken)
        self._taken.add(path)
        return path
