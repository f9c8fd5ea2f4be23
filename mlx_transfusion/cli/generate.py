"""`mlx-transfusion generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_transfusion.cache_limit import limit_cache
from mlx_transfusion.cli import options
from mlx_transfusion.cli.job import Files, Job, choose_seeds, job_from, new_job, read_prompts
from mlx_transfusion.cli.terminal import Bar, bar, message, picture_path, result
from mlx_transfusion.errors import UserError
from mlx_transfusion.settings import DEFAULTS

if TYPE_CHECKING:
    from mlx_transfusion.events import GeneratedImage, Step
    from mlx_transfusion.model_io import Loaded
    from mlx_transfusion.settings import ResolvedSettings


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What the picture shows.")] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    seed: options.Seeds = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", "-n", help="Pictures a prompt, at seeds S, S+1, ...")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt a line; - is standard input.")
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE.png", help="Repeat a picture with the settings it carries."),
    ] = None,
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
    width: options.Width = None,
    height: options.Height = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pictures painted at once.", show_default=str(DEFAULTS.batch_size)),
    ] = None,
    output: options.Output = Path("image.png"),
    overwrite: options.Overwrite = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also put all pictures on one sheet.")] = False,
    preview_every: Annotated[
        int | None, typer.Option(metavar="N", help="Also write the estimate of every Nth step.")
    ] = None,
    cache_limit: options.CacheLimit = None,
    as_json: options.Json = False,
) -> None:
    """Paint pictures; prints the name of each file.

    Every PNG carries its settings: `info FILE.png` shows them, `--from FILE.png` repeats it.

    Several pictures are named NAME_seed_S.png. Existing files stay: _1, _2, ... is added to the name.
    """
    if sum(given is not None for given in (prompt, prompt_file, repeat)) != 1:
        raise UserError("give either a PROMPT, --prompt-file or --from")
    limit_cache(cache_limit)
    flags = {
        "sampler": sampler, "steps": steps, "angles": angles, "spacing": spacing, "guidance": guidance,
        "guidance_interval": guidance_interval, "negative_prompt": negative_prompt,
        "image_temperature": image_temp, "image_top_p": image_top_p, "image_top_k": image_top_k,
    }  # fmt: skip
    if repeat is not None:
        if seed or num_images is not None:
            raise UserError("--from takes the picture's own seed: leave out --seed and --num-images")
        job = job_from(repeat, flags, batch_size)
        model = model if model is not None else job.model
    else:
        base = replace(DEFAULTS, batch_size=DEFAULTS.batch_size if batch_size is None else batch_size)
        settings = options.image_settings(base, **flags).check()  # type: ignore[arg-type]
        job = new_job(read_prompts(prompt, prompt_file), choose_seeds(seed or [], num_images), settings)
    if preview_every is not None and preview_every < 1:
        raise UserError(f"--preview-every is {preview_every}: use at least 1")

    from mlx_transfusion.adapters import load_adapted
    from mlx_transfusion.images import check_folder
    from mlx_transfusion.model_io import read_config
    from mlx_transfusion.model_path import display_name, resolve
    from mlx_transfusion.text_to_image import size_to_paint

    path = resolve(model)
    config, extra = read_config(path)
    place = config, display_name(model, path), path
    try:
        given = job.size if (width, height) == (None, None) and job.size is not None else (width, height)
        (high, wide), warning = size_to_paint(*place, *given)
    except UserError:
        if given == (width, height):
            raise
        (high, wide), warning = size_to_paint(*place, None, None)  # another model than the picture's
    if warning is not None:
        message(warning)
    settings = job.settings.for_model(extra, display_name(model, path))  # before the weights are read
    output = picture_path(output)
    check_folder(output.parent)
    loaded = load_adapted(model, adapter or []).at_size(wide, high)
    if job.model_hash not in (None, loaded.fingerprint):
        message(
            f"warning: {repeat} was painted by weights {job.model_hash} of {job.model}, these are "
            f"{loaded.fingerprint} of {loaded.name}: the picture will differ"
        )
    _paint(loaded, job, settings, Files(job, output, overwrite), grid, preview_every, as_json)


def _paint(
    loaded: Loaded,
    job: Job,
    settings: ResolvedSettings,
    files: Files,
    grid: bool,
    preview_every: int | None,
    as_json: bool,
) -> None:
    from mlx_transfusion.text_to_image import iter_images

    count = len(job.prompts)
    done: list[GeneratedImage] = []
    with bar("paint", count) as progress:
        watcher = _Watcher(loaded, job, settings, files, progress, preview_every)
        try:
            for image in iter_images(loaded, job.prompts, job.seeds, settings, watcher.on_step):
                if job.keep in (None, image.index):
                    path = image.save(files.picture(image.index))
                    done.append(image)
                    _report(image, path, as_json)
                watcher.finished += 1
        except KeyboardInterrupt:
            message(
                f"interrupted: {len(done)} of {1 if job.keep is not None else count} pictures are finished"
            )
            raise
    if grid:
        _write_grid(sorted(done, key=lambda image: image.index), files.grid(), as_json)


class _Watcher:
    """Follows the sampler's steps: progress bar and previews."""

    def __init__(
        self,
        loaded: Loaded,
        job: Job,
        settings: ResolvedSettings,
        files: Files,
        progress: Bar,
        preview_every: int | None,
    ) -> None:
        self._loaded, self._job, self._settings, self._files = loaded, job, settings, files
        self._progress, self._every = progress, preview_every
        self.finished = 0

    def on_step(self, step: Step) -> None:
        share = len(step.indices) * step.step / step.steps
        self._progress.update(self.finished + share, f"step {step.step}/{step.steps}")
        if self._every is None or step.step % self._every:
            return
        from mlx_transfusion.images import save_png
        from mlx_transfusion.records import image_record

        rows = list(zip(step.indices, step.preview(), strict=True))
        for row, (index, pixels) in enumerate(rows):
            if self._job.keep in (None, index):
                prompt, seed = self._job.prompts[index], self._job.seeds[index]
                record = image_record(self._loaded, prompt, seed, self._settings, len(rows), row)
                save_png(self._files.preview(index, step.step), pixels, record | {"preview_step": step.step})


def _report(image: GeneratedImage, path: Path, as_json: bool) -> None:
    if as_json:
        result(
            {
                "file": str(path),
                "prompt": image.prompt,
                "seed": image.seed,
                "settings": image.settings,
                "seconds": round(image.seconds, 3),
            }
        )
    else:
        message(f"seed {image.seed}, {image.seconds:.2f} s: {image.prompt}")
        result(str(path))


def _write_grid(images: list[GeneratedImage], path: Path, as_json: bool) -> None:
    from mlx_transfusion.images import grid, save_png

    records = [image.settings for image in images]
    save_png(path, grid([image.pixels for image in images]), {"pictures": records})
    result({"file": str(path), "pictures": len(images)} if as_json else str(path))
