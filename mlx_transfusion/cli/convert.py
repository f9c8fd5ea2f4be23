"""`mlx-transfusion convert`: a model of another project becomes a folder that every verb takes."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_transfusion.cli import options
from mlx_transfusion.cli.terminal import bar, message, result


class DType(StrEnum):
    """How weights are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint: folder, file, or org/name of the Hugging Face hub."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="New model folder.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="What SOURCE is.", show_default="found out")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize", "-q", metavar="BITS", help="2, 3, 4, 5, 6, 8, mxfp4 or mxfp8: smaller matrices."
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Numbers that share a scale: 32, 64 or 128.")] = 64,
    dtype: Annotated[
        DType | None, typer.Option(help="Of all other weights.", show_default="as they are")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The autoencoder (folder, file or hub id), where SOURCE has none."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="config.json", help="Of our own model, where SOURCE has none.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="tokenizer.model or tokenizer.json, or its folder.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Account for every tensor and predict sizes; read and write no weights."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Turn a checkpoint of another project into a model folder; prints that folder.

    Every tensor must have its place, else they are listed and nothing is written.
    """
    from mlx_transfusion.errors import UserError
    from mlx_transfusion.model_path import display_name

    if output is None and not dry_run:
        raise UserError("--output is missing: name the new model folder, or look first with --dry-run")
    import mlx.core as mx

    convert_package = _package()
    if output is not None and not dry_run:
        convert_package.run.check_output(output, 0)  # before anything is downloaded
    coder = None if autoencoder is None else convert_package.hub.locate(autoencoder)
    done = convert_package.run.plan_of(
        convert_package.sources.Source(
            convert_package.hub.locate(source),
            display_name(source, Path(source)),
            config=config,
            tokenizer=tokenizer,
            autoencoder=coder,
        ),
        convert_package.quantize.Options(quantize, group_size, getattr(mx, dtype) if dtype else None),
        family,
    )
    if not dry_run:
        convert_package.run.check_tokenizer(done)
    if quantize is not None and done.quantization is None:
        message(
            "note: nothing gets fewer bits: autoencoders stay whole, and rows of other matrices must divide into "
            "groups (--group-size)"
        )
    facts = convert_package.predict.facts(done)
    if not dry_run and output is not None:
        with bar("convert", done.nbytes) as progress:
            facts["folder"] = str(convert_package.run.convert(done, output, progress.update))
    if as_json:
        result(facts)
        return
    for line in convert_package.predict.lines(facts):
        (result if dry_run else message)(line)
    if not dry_run:
        result(facts["folder"])


def _package() -> Any:
    """The converters, whose folder stands at the top of the source tree and inside an installed package."""
    try:
        package = import_module("mlx_transfusion.convert")
    except ModuleNotFoundError as error:
        if error.name != "mlx_transfusion.convert":
            raise
        package = import_module("convert")
    for name in ("run", "sources", "hub", "quantize", "predict"):
        import_module(f"{package.__name__}.{name}")
    return package
