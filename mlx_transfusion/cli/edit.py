"""`mlx-transfusion edit`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_transfusion.cache_limit import limit_cache
from mlx_transfusion.cli import options
from mlx_transfusion.cli.job import Files, choose_seeds, new_job
from mlx_transfusion.cli.terminal import bar, message, picture_path, result
from mlx_transfusion.errors import UserError
from mlx_transfusion.model_path import EDITOR
from mlx_transfusion.settings import DEFAULTS, GenerationSettings

if TYPE_CHECKING:
    from mlx_transfusion.model_io import Loaded


def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to change.")],
    instruction: Annotated[
        str | None, typer.Argument(metavar="INSTRUCTION", help='E.g. "make it dark skin tone".')
    ] = None,
    model: options.EditModel = None,
    adapter: options.Adapter = None,
    seed: options.Seeds = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", "-n", help="Pictures, at seeds S, S+1, ...")
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE.png", help="Repeat an edited picture with the settings it carries."
        ),
    ] = None,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    spacing: options.Spacing = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How much the instruction counts; 1 is no guidance.", show_default="the model's"),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(help="How much the picture counts; 1 is no guidance.", show_default="1"),
    ] = None,
    guidance_interval: options.GuidanceInterval = None,
    width: options.Width = None,
    height: options.Height = None,
    output: options.Output = Path("edited.png"),
    overwrite: options.Overwrite = False,
    cache_limit: options.CacheLimit = None,
    as_json: options.Json = False,
) -> None:
    """Change a picture as an instruction says; prints the name of each file.

    Another model than the bundled one has to be trained on edits: a converted BAGEL, or one of `finetune` on rows
    {"source", "instruction", "target"}. The PNG carries its settings; `--from` repeats it from the same IMAGE.
    """
    if (instruction is None) == (repeat is None):
        raise UserError("give either an INSTRUCTION or --from FILE.png")
    limit_cache(cache_limit)
    flags = {
        "sampler": sampler, "steps": steps, "angles": None, "spacing": spacing, "guidance": guidance,
        "guidance_interval": guidance_interval, "negative_prompt": None,
    }  # fmt: skip
    settings, seeds = DEFAULTS, seed or []
    record: dict[str, Any] = {}
    if repeat is not None:
        if seed or num_images is not None:
            raise UserError("--from takes the picture's own seed: leave out --seed and --num-images")
        settings, record = _recorded(repeat)
        instruction, seeds = str(record["prompt"]), [int(record["seed"])]
        model = model if model is not None else str(record["model"])
        if image_guidance is None:
            image_guidance = float(record["edit"]["image_guidance"])
        if (width, height) == (None, None):
            width, height = record.get("width"), record.get("height")
    assert instruction is not None
    settings = options.image_settings(settings, **flags).check()  # type: ignore[arg-type]
    seeds = choose_seeds(seeds, num_images)

    from mlx_transfusion.adapters import load_adapted
    from mlx_transfusion.editing import IMAGE_GUIDANCE, Edit, edit_images, load_source, source_hash
    from mlx_transfusion.images import check_folder

    output = picture_path(output)
    check_folder(output.parent)
    loaded = load_adapted(model or EDITOR, adapter or [])
    pixels = load_source(loaded.pictures, image)
    size = _size(loaded, pixels, width, height)
    if repeat is not None:
        _check_same(repeat, record, loaded, source_hash(pixels))
    files = Files(new_job([instruction], seeds, settings), output, overwrite)
    scale = IMAGE_GUIDANCE if image_guidance is None else image_guidance
    with bar("edit", len(seeds)) as progress:
        for i, one in enumerate(seeds):

            def on_step(step: Any, done: int = i) -> None:
                progress.update(done + step.step / step.steps, f"step {step.step}/{step.steps}")

            made = edit_images(loaded, [Edit(pixels, instruction, one)], settings, scale, on_step, size)[0]
            path = made.save(files.picture(i))
            if as_json:
                seconds = round(made.seconds, 3)
                result({"file": str(path), "seed": one, "settings": made.settings, "seconds": seconds})
            else:
                message(f"seed {one}, {made.seconds:.2f} s: {instruction}")
                result(str(path))


def _size(loaded: Loaded, source: Any, width: int | None, height: int | None) -> tuple[int, int] | None:
    """(height, width) to paint: a side that is not given is the source's; None where neither is."""
    if width is None and height is None:
        return None
    size = source.shape[0] if height is None else height, source.shape[1] if width is None else width
    if loaded.pictures.at_size(*size).picture_size not in loaded.pictures.sizes:
        message(f"warning: model {loaded.name} did not learn {size[1]}x{size[0]}: the picture may be poor")
    return size


def _recorded(file: Path) -> tuple[GenerationSettings, dict[str, Any]]:
    """The settings and the record of an edited picture. Raises UserError for any other picture."""
    from mlx_transfusion.images import read_record
    from mlx_transfusion.records import settings_from_record

    record = read_record(file)
    table = record.get("edit")
    if not isinstance(table, dict) or not isinstance(table.get("image_guidance"), int | float):
        raise UserError(f"{file}: is not the result of an edit: repeat it with `generate --from`")
    return replace(settings_from_record(record | {"edit": None}, str(file)), batch_size=1), record


def _check_same(file: Path, record: dict[str, Any], loaded: Loaded, digest: str) -> None:
    """Raises UserError when the source is another picture; warns when the weights are others."""
    if record["edit"].get("source_hash") != digest:
        raise UserError(f"{file}: was made from another picture: give the one that was edited")
    if record.get("model_hash") != loaded.fingerprint:
        message(
            f"warning: {file} was painted by weights {record.get('model_hash')}, these are "
            f"{loaded.fingerprint} of {loaded.name}: the picture will differ"
        )
