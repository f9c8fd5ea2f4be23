"""Flags that several verbs share, named as mlx-lm and mflux name them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import BUNDLED, DEFAULT_MODEL, EDITOR
from mlx_transfusion.objective import CONSISTENCY
from mlx_transfusion.settings import (
    CONSISTENCY_GUIDANCE,
    DEFAULTS,
    DIFFUSION_GUIDANCE,
    DIFFUSION_SAMPLER,
    GenerationSettings,
)


def _model(default: str) -> Any:
    """The option that names a model."""
    return typer.Option(
        "--model", "-m", metavar="MODEL",
        help=f'Model folder, "org/name" on the Hugging Face hub, or bundled: {" or ".join(BUNDLED)}.',
        show_default=default,
    )  # fmt: skip


Model = Annotated[str | None, _model(DEFAULT_MODEL)]
EditModel = Annotated[str | None, _model(EDITOR)]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[:SCALE]",
        help="A fine-tuned adapter of the model, and how much of it. Repeatable.",
    ),
]
Seeds = Annotated[list[int] | None, typer.Option(help="Repeatable: one picture each.", show_default="random")]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="ddpm, ddim, heun, midpoint, dpmpp_2m; consistency for a consistency model.",
        show_default=f"{DIFFUSION_SAMPLER}, or the only one of a consistency model",
    ),
]
Angles = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Of sampler consistency: where its steps after the first begin (radians, decreasing).",
        show_default="the model's",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Sampler steps.", show_default="by sampler")]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale; 1 is none.",
        show_default=f"{DIFFUSION_GUIDANCE:g}, or {CONSISTENCY_GUIDANCE:g} of a consistency model",
    ),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guide only between these noise angles (radians, 0 to 1.5708)."),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Spacing of the steps: uniform, flow, shifted or karras.",
        show_default="the model's",
    ),
]
ImageTemperature = Annotated[
    float | None,
    typer.Option(
        "--image-temp", help="Of a picture's tokens, in a model that writes them.",
        show_default=f"{DEFAULTS.image_temperature:g}",
    ),
]  # fmt: skip
ImageTopP = Annotated[
    float | None,
    typer.Option(help="As --top-p, of a picture's tokens.", show_default=f"{DEFAULTS.image_top_p:g}"),
]
ImageTopK = Annotated[int | None, typer.Option(help="As --top-k, of a picture's tokens.", show_default="off")]
Width = Annotated[int | None, typer.Option(help="Of the picture, in pixels.", show_default="the model's")]
Height = Annotated[int | None, typer.Option(help="Of the picture, in pixels.", show_default="the model's")]
NegativePrompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the picture should not show; needs guidance.")
]
MaxTokens = Annotated[int, typer.Option(help="Most text tokens to write.")]
Temperature = Annotated[float, typer.Option("--temp", "--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Choose among this many of the likeliest tokens; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes words of the text so far less likely.")]
CacheLimit = Annotated[
    float | None,
    typer.Option(
        metavar="GB", help="Freed memory that MLX keeps for reuse; 0 keeps none.", show_default="MLX's own"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE.png", help="Picture file, or a folder.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace existing files; otherwise _1, _2, ... is added to the name."),
]


def image_settings(
    base: GenerationSettings,
    *,
    sampler: str | None,
    steps: int | None,
    angles: str | None,
    spacing: str | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    negative_prompt: str | None,
    image_temperature: float | None = None,
    image_top_p: float | None = None,
    image_top_k: int | None = None,
) -> GenerationSettings:
    """`base` with the flags that were given, over what they make obsolete in it (a picture's own settings).

    Steps and angles set each other. A sampler of the other kind, diffusion or consistency, leaves nothing of
    the sampling as it was. Raises UserError for angles that are no list of numbers.
    """
    if None not in (sampler, base.sampler) and (sampler == CONSISTENCY) != (base.sampler == CONSISTENCY):
        d = DEFAULTS
        base = dataclasses.replace(
            base, steps=d.steps, angles=d.angles, spacing=d.spacing, guidance=d.guidance,
            guidance_interval=d.guidance_interval,
        )  # fmt: skip
    if angles is not None:
        base = dataclasses.replace(base, steps=None)
    elif base.angles is not None and steps not in (None, 1 + len(base.angles)):
        base = dataclasses.replace(base, angles=None)
    given = {
        "sampler": sampler,
        "steps": steps,
        "angles": None if angles is None else _numbers(angles),
        "spacing": spacing,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "negative_prompt": negative_prompt,
        "image_temperature": image_temperature,
        "image_top_p": image_top_p,
        "image_top_k": image_top_k,
    }
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def _numbers(text: str) -> tuple[float, ...]:
    """ "1.1,0.6" -> (1.1, 0.6)"""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--angles {text}: use numbers with commas between them, e.g. 1.1,0.6 (one step: --steps 1)"
        ) from None
