"""`mlx-transfusion autoencoder`: train one, encode and decode pictures with one, see what it loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, message, result
from mlx_transfusion.cli.train import Overrides, Resume
from mlx_transfusion.errors import UserError

if TYPE_CHECKING:
    from mlx_transfusion.autoencoder.folder import LoadedAutoencoder

app = typer.Typer(
    no_args_is_help=True, help="Pictures to small latents and back: train, encode, decode, info."
)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of an autoencoder, trained here or converted.")
]
Rows = Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Rows that name pictures.")]
Images = Annotated[
    Path | None, typer.Option(metavar="DIR|FILE.tar", help="Where they lie.", show_default="beside the rows")
]


@app.callback()
def _group() -> None:
    """Pictures to small latents and back."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Training configuration.")],
    overrides: Overrides = None,
    resume: Resume = True,
) -> None:
    """Train an autoencoder; prints the folder of its last checkpoint, which encode, decode and info take."""
    from mlx_transfusion.autoencoder.config import load_training
    from mlx_transfusion.autoencoder.trainer import train as run

    result(str(run(load_training(config, overrides or []), resume=resume)))


@app.command()
def encode(
    autoencoder: Folder,
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A picture, or rows (.jsonl) that name pictures.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.safetensors", help="File of latents.")
    ],
    images: Images = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|WxH",
            help="Pixels that pictures are brought to. Given several times: each picture to the nearest in aspect.",
        ),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Mirrored pictures too.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
) -> None:
    """Encode a data set once, for training, or one picture; prints the file of latents (of codes, by a codebook).

    It holds the autoencoder's fingerprint: with any other autoencoder it is refused. Of several sizes each has a file
    of its own, FILE-WIDTHxHEIGHT.safetensors.
    """
    from mlx_transfusion.autoencoder.folder import load_autoencoder
    from mlx_transfusion.autoencoder.latents import by_size, write_cache
    from mlx_transfusion.picture_sizes import named, parse_size
    from mlx_transfusion.training.image_store import ImageRef, open_images

    loaded = load_autoencoder(autoencoder)
    sizes = list(dict.fromkeys(map(parse_size, size or [str(loaded.config.sample_size)])))
    for one in sizes:
        loaded.model.check_pixels((1, *one, 3))
    if source.suffix == ".jsonl":
        refs = _pictures(source, images)
    elif source.is_file():
        refs = [ImageRef(open_images(source.parent), source.name)]
    else:
        raise UserError(f"{source}: no such picture or file of rows (.jsonl)")
    for one, chosen in by_size(refs, sizes).items():
        file = output if len(sizes) == 1 else output.with_stem(f"{output.stem}-{named([one])}")
        with bar("encode", len(chosen)) as progress:
            made = write_cache(
                file, loaded, chosen, one, flips=flips, dtype="float16" if half else "float32",
                progress=progress.update,
            )  # fmt: skip
        result(str(made))


@app.command()
def decode(
    autoencoder: Folder,
    latents: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Of encode.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.")],
    count: Annotated[int | None, typer.Option(help="Only the first so many.", show_default="all")] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="By the linear map, without the decoder.")
    ] = False,
) -> None:
    """Turn latents back into pictures, DIR/NAME.png; prints each file."""
    from mlx_transfusion.autoencoder.decoding import decode_file
    from mlx_transfusion.autoencoder.folder import load_autoencoder

    for file in decode_file(load_autoencoder(autoencoder), latents, output, count, preview):
        result(str(file))


@app.command()
def info(
    autoencoder: Folder,
    rows: Rows = None,
    images: Images = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels that pictures are brought to.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Measure so many pictures.", show_default="all")] = None,
    frechet: Annotated[bool, typer.Option(help="Also the Frechet distance (needs [features]).")] = True,
    as_json: options.Json = False,
) -> None:
    """Show an autoencoder's sizes and scale; with --rows, what pictures lose in it (PSNR, Frechet distance)."""
    from mlx_transfusion.autoencoder.folder import load_autoencoder
    from mlx_transfusion.cli.info import lines

    loaded = load_autoencoder(autoencoder)
    facts = _facts(loaded)
    if rows is not None:
        facts["reconstruction"] = _measured(loaded, rows, images, size, count, frechet)
    if as_json:
        result(facts)
        return
    for line in lines(facts):
        result(line)


def _facts(loaded: LoadedAutoencoder) -> dict[str, Any]:
    from mlx_transfusion.model_io import flat_parameters

    parts: dict[str, int] = {}
    for name, value in flat_parameters(loaded.model).items():
        part = "decoder" if name.startswith(("decoder.", "post_quant_conv.")) else "encoder"
        parts[part] = parts.get(part, 0) + value.size
    c = loaded.config
    side = c.sample_size // c.factor
    of = (
        f"{c.latent_channels}"
        if c.quantizer is None
        else f"{c.latent_channels}, each of {c.quantizer.codes} codes"
    )
    return {
        "autoencoder": str(loaded.path),
        "fingerprint": loaded.fingerprint,
        "parameters": parts | {"total": sum(parts.values())},
        "latents": f"{c.sample_size}x{c.sample_size}x3 -> {side}x{side}x{of} (factor {c.factor})",
        "preview": "yes" if loaded.preview is not None else "no",
        "config": c.to_dict(),
    }


def _measured(
    loaded: LoadedAutoencoder,
    rows: Path,
    images: Path | None,
    size: str | None,
    count: int | None,
    frechet: bool,
) -> dict[str, Any]:
    from mlx_transfusion.autoencoder.measures import PART, measure
    from mlx_transfusion.evaluation.features import features
    from mlx_transfusion.picture_sizes import parse_size
    from mlx_transfusion.training.pixels import load_pixels

    height, width = parse_size(size or str(loaded.config.sample_size))
    loaded.model.check_pixels((1, height, width, 3))
    refs = _pictures(rows, images)[:count]
    if frechet and len(refs) < 2:
        raise UserError(f"{rows}: the Frechet distance needs 2 pictures or more: use --no-frechet")
    with bar("measure", len(refs)) as progress:

        def parts() -> Any:
            for start in range(0, len(refs), PART):
                yield load_pixels(refs[start : start + PART], height, width, 2)
                progress.update(min(start + PART, len(refs)))

        found = measure(loaded.model, parts(), features if frechet else None, loaded.preview)
    if frechet:
        message("frechet is of EfficientNet-Lite0's features: no FID")
    return found


def _pictures(rows: Path, images: Path | None) -> list[Any]:
    """The distinct pictures that rows name, in their order."""
    from mlx_transfusion.training.rows import ImageRef, Source, load_rows

    found = load_rows(Source(rows, images)).rows
    return list(dict.fromkeys(one for row in found for one in row.segments if isinstance(one, ImageRef)))
