"""`mlx-transfusion complete`: continue a text, with pictures where the model paints some."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, message, picture_path, result
from mlx_transfusion.errors import UserError
from mlx_transfusion.settings import DEFAULTS

if TYPE_CHECKING:
    from mlx_transfusion.events import Finished, Painted, Token


def complete(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    model: options.Model = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn: apply the model's chat template.")
    ] = False,
    system_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: what the model is told first.")
    ] = None,
    max_tokens: options.MaxTokens = DEFAULTS.max_tokens,
    temperature: options.Temperature = DEFAULTS.temperature,
    top_p: options.TopP = DEFAULTS.top_p,
    top_k: options.TopK = DEFAULTS.top_k,
    repetition_penalty: options.RepetitionPenalty = DEFAULTS.repetition_penalty,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    max_images: Annotated[
        int, typer.Option(help="Most pictures to paint; 0 only writes.")
    ] = DEFAULTS.max_images,
    seed: Annotated[int | None, typer.Option(help="Of words and pictures.", show_default="random")] = None,
    negative_prompt: options.NegativePrompt = None,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    angles: options.Angles = None,
    spacing: options.Spacing = None,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = None,
    image_temp: options.ImageTemperature = None,
    image_top_p: options.ImageTopP = None,
    image_top_k: options.ImageTopK = None,
    output: options.Output = Path("image.png"),
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Continue a text; the model may paint. Prints the text as it comes, and [FILE.png] for a picture."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty: give some text to continue")
    if system_prompt is not None and not chat:
        raise UserError("--system-prompt belongs to a chat: add --chat")
    writing = dataclasses.replace(
        DEFAULTS,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        max_images=max_images,
    )
    settings = options.image_settings(
        writing,
        sampler=sampler,
        steps=steps,
        angles=angles,
        spacing=spacing,
        guidance=guidance,
        guidance_interval=guidance_interval,
        negative_prompt=negative_prompt,
        image_temperature=image_temp,
        image_top_p=image_top_p,
        image_top_k=image_top_k,
    ).check()
    from mlx_transfusion.events import Step
    from mlx_transfusion.images import check_folder
    from mlx_transfusion.interleave import Tokens
    from mlx_transfusion.interleave import complete as run
    from mlx_transfusion.model_io import load
    from mlx_transfusion.models.family import PictureFamily

    output = picture_path(output)
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    loaded = load(model)
    if max_images and isinstance(loaded.model, PictureFamily):
        check_folder(output.parent)
    document: str | list[Tokens] = text
    if chat:
        from mlx_transfusion.chat import chat_ids

        ids = chat_ids(loaded.path, loaded.tokenizer, text, system_prompt, loaded.name)
        document = [Tokens(tuple(ids))]
    with bar("paint", 1.0) as progress:

        def on_step(step: Step) -> None:
            progress.update(step.step / step.steps, f"step {step.step}/{step.steps}")

        events = run(loaded, document, chosen, settings, on_step)
        message(f"seed {chosen}")  # only now: bad input is one line
        _show(events, output, overwrite, as_json)


def _show(events: Iterator[Token | Painted | Finished], output: Path, overwrite: bool, as_json: bool) -> None:
    """Print what comes, and save the pictures."""
    from mlx_transfusion.events import Finished, Token
    from mlx_transfusion.images import free_path

    for event in events:
        if isinstance(event, Token):
            if as_json:
                result({"text": event.text, "tokens": list(event.ids)})
            else:
                print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            result({"finished": event.reason} if as_json else "")
        else:
            path = _numbered(output, event.image.index) if overwrite else free_path(output)
            event.image.save(path)
            image = event.image
            if as_json:
                result({"file": str(path), "seed": image.seed, "settings": image.settings})
            else:
                print(f"[{path}]", end="", flush=True)


def _numbered(output: Path, index: int) -> Path:
    """NAME.png, NAME_1.png, NAME_2.png, ..."""
    return output.with_name(f"{output.stem}_{index}{output.suffix}") if index else output
