"""`mlx-transfusion finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import message, result
from mlx_transfusion.cli.train import Resume

if TYPE_CHECKING:
    from mlx_transfusion.finetune.run import Plan

SHOWN = 20


def finetune(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; flags come on top.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="What to start from.", show_default="emoji"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Pictures with .txt captions beside them, or train.jsonl (and valid.jsonl)."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Of adapter and checkpoints.", show_default="adapters"
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="NAME", help="lora, dora or full.", show_default="lora")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of each adapter.", show_default="8")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of each adapter.", show_default="2")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Blocks with an adapter, from the last; -1 is all.", show_default="-1")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="PATTERN", help='Layers, e.g. "*.self_attn.*_proj". Repeatable.'),
    ] = None,
    image_only: Annotated[
        bool | None,
        typer.Option("--image-only", help="Only painting changes; text and descriptions keep every bit."),
    ] = None,
    quantize: Annotated[int | None, typer.Option(metavar="BITS", help="QLoRA: base in 4 or 8 bits.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", show_default="1e-3, full 1e-4")
    ] = None,
    iters: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="300")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.", show_default="8")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts of a batch, one after the other.", show_default="1")
    ] = None,
    grad_checkpoint: Annotated[
        bool | None, typer.Option("--grad-checkpoint", help="Less memory, a third more time.")
    ] = None,
    low_ram: Annotated[
        bool | None,
        typer.Option(
            "--low-ram", help="Converted models: encode all pictures first, then keep only what steps need."
        ),
    ] = None,
    cache_limit: options.CacheLimit = None,
    caption: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Caption of pictures without a .txt.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Data like --data that the model should go on painting as before."),
    ] = None,
    prior_share: Annotated[
        float | None, typer.Option(help="Share of --prior in each batch.", show_default="0.5")
    ] = None,
    preview: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="Paint it now and then. Repeatable.")
    ] = None,
    preview_every: Annotated[int | None, typer.Option(help="Steps.", show_default="100")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="100")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many validations without a better one.", show_default="never"),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0")] = None,
    resume: Resume = True,
    check: Annotated[
        bool, typer.Option("--check", help="Read all data and estimate memory; train nothing.")
    ] = False,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Start even if the memory seems too small.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: a JSON object.")] = False,
) -> None:
    """Teach a model a subject, a style or editing from a few pictures; prints the folder of the adapter.

    Use it with --adapter DIR[:SCALE], or as --model DIR; `fuse` makes a whole model of it. What cannot be used of
    the data is left out, with one line each.
    """
    from mlx_transfusion.finetune import run
    from mlx_transfusion.finetune.config import read_finetune_config
    from mlx_transfusion.training.processes import is_main

    flags: dict[str, Any] = {
        "model": model, "data": data, "output": output, "type": kind, "rank": rank, "scale": scale,
        "layers": layers, "targets": targets, "image_only": image_only, "quantize": quantize,
        "learning_rate": learning_rate, "iters": iters, "batch_size": batch_size, "accumulate": accumulate,
        "grad_checkpoint": grad_checkpoint, "low_ram": low_ram, "cache_limit": cache_limit,
        "caption": caption, "prior": prior, "prior_share": prior_share,
        "previews": preview, "preview_every": preview_every, "save_every": save_every, "patience": patience,
        "seed": seed,
    }  # fmt: skip
    settings = read_finetune_config(config, flags)
    plan = run.make_plan(settings, write=not check)
    if check and as_json:
        result(plan.report())
        return
    if is_main():
        _show(plan)
    if not check:
        folder = run.finetune(settings, plan, resume, ignore_memory)
        if is_main():
            result(str(folder))


def _show(plan: Plan) -> None:
    """Lines for people about the data and the memory."""
    r = plan.report()
    for name in ("skipped", "notes"):
        lines = r[name]
        for line in lines[:SHOWN]:
            message(f"{'skipped' if name == 'skipped' else 'note'}: {line}")
        if len(lines) > SHOWN:
            message(f"... and {len(lines) - SHOWN} more {name}")
    sizes = ", ".join(f"{count} of {size}" for size, count in list(r["sizes"].items())[:4])
    message(
        f"{r['rows']} rows ({r['edits']} edits), {r['valid_rows']} for validation; {r['pictures']} pictures: {sizes}"
    )
    t = r["tokens"]
    message(f"{t['least']} to {t['most']} tokens a text, sequences of {r['sequence_length']}")
    m = r["memory_gb"]
    message(
        f"memory: about {m['total']:.2f} GB (weights {m['weights']:.2f}, optimiser and averages "
        f"{m['trained'] + m['optimizer']:.2f}, activations {m['activations']:.2f})"
    )
