"""Flags that several verbs share, named as mlx-lm and mflux name them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mlx_transfusion.settings import DEFAULTS, GenerationSettings

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", help='Model folder, "org/name" on the Hugging Face hub, or emoji.',
        show_default="emoji, the bundled model",
    ),
]  # fmt: skip
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="ddpm, ddim, heun, midpoint or dpmpp_2m.", show_default=DEFAULTS.sampler
    ),
]
Steps = Annotated[int | None, typer.Option(help="Sampler steps.", show_default="by sampler")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 1 is none.", show_default=f"{DEFAULTS.guidance:g}"),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guide only between these noise angles (radians, 0 to 1.5708)."),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Spacing of the steps: uniform or karras.", show_default=DEFAULTS.spacing
    ),
]
NegativePrompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the picture should not show; needs guidance.")
]
MaxTokens = Annotated[int, typer.Option(help="Most text tokens to write.")]
Temperature = Annotated[float, typer.Option("--temp", "--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Choose among this many of the likeliest tokens; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes words of the text so far less likely.")]
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
    spacing: str | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    negative_prompt: str | None,
) -> GenerationSettings:
    """`base` with the flags that were given."""
    given = {
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "negative_prompt": negative_prompt,
    }
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
