"""`python -m mlx_transfusion.convert`: a state dict with our parameter names to an MLX model folder."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mlx_transfusion.errors import UserError

PROGRAM = "python -m mlx_transfusion.convert"
USAGE, INTERRUPTED = 2, 130

app = typer.Typer(
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


class DType(StrEnum):
    """How weights are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A .safetensors, .pt, .pth, .bin or .index.json file, or their folder."
        ),
    ],
    config: Annotated[
        Path, typer.Option(metavar="config.json", help="The model's configuration, in our own fields.")
    ],
    tokenizer: Annotated[Path, typer.Option(metavar="FILE", help="tokenizer.model or tokenizer.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New model folder.")],
    dtype: Annotated[
        DType | None, typer.Option(help="Of the stored weights.", show_default="as they are")
    ] = None,
) -> None:
    """Write an MLX model folder from a state dict; every tensor must have its place."""
    import mlx.core as mx

    from .state_dict import convert_state

    typer.echo(convert_state(source, config, tokenizer, output, getattr(mx, dtype) if dtype else None))


def main() -> NoReturn:
    """Run and exit: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        code = app(prog_name=PROGRAM, standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # the sign of click's exceptions for bad flags
            raise
        sys.exit(_fail(error.format_message()))
    sys.exit(code)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    main()
