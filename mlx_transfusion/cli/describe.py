"""`mlx-transfusion describe`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, result
from mlx_transfusion.settings import DEFAULTS


def describe(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, WebP, ...")],
    model: options.Model = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Ask this (models that answer).", show_default="description"),
    ] = None,
    max_tokens: options.MaxTokens = DEFAULTS.max_tokens,
    temperature: options.Temperature = DEFAULTS.temperature,
    top_p: options.TopP = DEFAULTS.top_p,
    top_k: options.TopK = DEFAULTS.top_k,
    repetition_penalty: options.RepetitionPenalty = DEFAULTS.repetition_penalty,
    seed: Annotated[int, typer.Option(help="Of the words, when --temp is above 0.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Say what an image shows: one line for each image."""
    settings = dataclasses.replace(
        DEFAULTS,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_images=0,
    ).check()
    from mlx_transfusion.images import load_for
    from mlx_transfusion.interleave import describe as run
    from mlx_transfusion.model_io import load, read_config
    from mlx_transfusion.model_path import display_name, resolve
    from mlx_transfusion.text_to_image import unread_model

    path = resolve(model)
    reader = unread_model(read_config(path)[0], display_name(model, path), path)
    # A bad image is found before the weights are read.
    pixels = [load_for(reader, image) for image in images]
    loaded = load(model)
    with bar("describe", len(images)) as progress:
        for number, (image, data) in enumerate(zip(images, pixels, strict=True), 1):
            text = run(loaded, data, seed, settings, question)
            progress.update(number)
            if as_json:
                result({"file": str(image), "text": text})
            else:
                result(text if len(images) == 1 else f"{image}: {text}")
