"""From a SOURCE to a model folder: find the family, account for every tensor, convert one at a time, rename.

The folder is written under another name and renamed when it is complete, so an interrupted conversion leaves nothing
that looks finished.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import write_json
from mlx_transfusion.model_io import special_ids
from mlx_transfusion.model_path import CONFIG_FILE
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, Tokenizer

from .account import Account, Job, account
from .card import model_card
from .families import STRANGE, converter, find
from .quantize import Options, quantized
from .shards import ShardWriter, numbers
from .sources import Source

SPARE = 16 << 20
"""Free bytes that are left besides the weights: for the index, the tokenizer and the file system."""

Progress = Callable[[int, str], None]
"""Called with the bytes of weights that are written, and the name of the tensor."""


def plan_of(source: Source, options: Options, family: str | None = None) -> Account:
    """What a conversion would do, from headers alone. Raises UserError for a source that does not fit."""
    found = find(source) if family is None else converter(family)
    try:
        done = account(found.plan(source), options)
    except STRANGE as error:
        raise UserError(
            f"{source.path}: not a checkpoint of the {found.name} family ({type(error).__name__}: {error}): "
            "its config.json is damaged, or of a form that is not known"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        _write_files(done, Path(folder))
        _check_tokenizer(done, Path(folder))
    return done


def convert(done: Account, output: Path, progress: Progress = lambda *_: None) -> Path:
    """Write the model folder `output`, which `mlx_transfusion.load` reads, and return its path.

    Memory: one tensor, and what becomes of it. Raises UserError, with nothing left behind, when `output` exists, the
    disk is too small or full, a value does not fit into the new dtype, or tensors that should be equal are not.
    """
    check_output(output, done.nbytes)
    temporary = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_files(done, temporary)
        with ShardWriter(temporary, done.stored, done.parameters) as writer:
            _write_tensors(done, writer, progress)
        (temporary / "README.md").write_text(model_card(done, output.name), encoding="utf-8")
        write_json(temporary / CONFIG_FILE, config_data(done))
        os.rename(temporary, output)
    except OSError as error:
        raise UserError(f"{output}: cannot write the model: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def check_output(output: Path, nbytes: int) -> None:
    """Raises UserError when `output` exists, or its disk has no room for `nbytes` of weights."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already: choose another output folder")
    place = next(p for p in output.absolute().parents if p.exists())
    if not place.is_dir():
        raise UserError(f"{output}: cannot write the model: Not a directory")
    free = shutil.disk_usage(place).free
    if free < nbytes + SPARE:
        raise UserError(
            f"{output}: needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make room, "
            "choose another disk, or use fewer bits (--quantize)"
        )


def check_tokenizer(done: Account) -> None:
    """Raises UserError for a model without a tokenizer, whose folder no verb could use."""
    if done.config is not None and not done.plan.files.keys() & {SENTENCEPIECE_FILE, HUGGINGFACE_FILE}:
        raise UserError(
            f"the {done.plan.family} checkpoint has no {HUGGINGFACE_FILE} and no {SENTENCEPIECE_FILE}: name one with "
            "--tokenizer"
        )


def _write_tensors(done: Account, writer: ShardWriter, progress: Progress) -> None:
    written = 0
    for job in done.jobs:
        progress(written, job.entry.source)
        if job.entry.same_as:
            _check_same(job, done)
        if not job.stored:
            continue
        for array in converted(job):
            writer.write(array)
            written += array.nbytes
            del array
        mx.clear_cache()  # freed memory back to the system, not kept for arrays of the same size
    progress(written, "")


def converted(job: Job) -> list[mx.array]:
    """What is stored of one tensor. Raises UserError for values beyond the new dtype."""
    array = job.entry.op.apply(job.checkpoint.read(job.name))
    if job.dtype is not None and array.dtype != job.dtype:
        old, array = array, array.astype(job.dtype)
        if job.dtype == mx.float16 and mx.any(mx.isfinite(old) & ~mx.isfinite(array)).item():
            raise UserError(
                f"{job.checkpoint.where}: values beyond the range of {job.dtype} in {job.name}: use a wider dtype"
            )
        del old
    out = quantized(array, job.setting) if job.setting else [mx.contiguous(array)]
    mx.eval(out)
    return out


def _check_same(job: Job, done: Account) -> None:
    """Raises UserError unless a tied tensor has the bits of the one that is used."""
    other = next(j for j in done.jobs if j.entry.source == job.entry.same_as)
    if numbers(job.checkpoint.read(job.name)) != numbers(other.checkpoint.read(other.name)):
        raise UserError(
            f"{job.checkpoint.where}: {job.name} differs from {other.name}, which the {done.plan.family} family "
            "uses in its place"
        )


def config_data(done: Account) -> dict[str, Any]:
    """The new config.json."""
    tables = dict(done.plan.extra)
    if done.quantization is not None:
        tables |= {"quantization": done.quantization, "quantization_config": done.quantization}
    return dict(done.plan.config) | tables


def _write_files(done: Account, folder: Path) -> None:
    for file, content in done.plan.files.items():
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            shutil.copyfile(content, folder / file)


def _check_tokenizer(done: Account, folder: Path) -> None:
    """Raises UserError for a tokenizer that is broken or larger than the model's vocabulary."""
    if done.config is None or not done.plan.files.keys() & {SENTENCEPIECE_FILE, HUGGINGFACE_FILE}:
        return
    size = Tokenizer.load(folder, special=special_ids(done.config)).vocab_size
    if size > done.config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens and the config's vocab_size is {done.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
