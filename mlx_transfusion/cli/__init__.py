"""The command line: verbs that read flags and call the library. Help imports neither mlx nor numpy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from mlx_transfusion.cli import autoencoder, lora, shards, tokenizer
from mlx_transfusion.cli.bench import bench
from mlx_transfusion.cli.complete import complete
from mlx_transfusion.cli.convert import convert
from mlx_transfusion.cli.describe import describe
from mlx_transfusion.cli.distill import distill
from mlx_transfusion.cli.edit import edit
from mlx_transfusion.cli.evaluate import evaluate
from mlx_transfusion.cli.extend import extend
from mlx_transfusion.cli.finetune import finetune
from mlx_transfusion.cli.fuse import fuse
from mlx_transfusion.cli.generate import generate
from mlx_transfusion.cli.info import info
from mlx_transfusion.cli.plan import plan
from mlx_transfusion.cli.train import train
from mlx_transfusion.errors import UserError

PROGRAM = "mlx-transfusion"
USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

app = typer.Typer(
    name=PROGRAM,
    help="Transfusion models: one transformer that writes text and paints pictures.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for verb in (
    generate,
    edit,
    describe,
    complete,
    convert,
    extend,
    info,
    train,
    finetune,
    distill,
    evaluate,
    bench,
    fuse,
    plan,
):
    app.command()(verb)
app.add_typer(autoencoder.app, name="autoencoder")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(lora.app, name="lora")
app.add_typer(shards.app, name="shards")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(given or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        # Without typer's own handling of errors, which frames them in a box of many lines.
        code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_has_gone()
    except SystemExit as stop:
        # click's own answer to a closed pipe is exit code 1
        if isinstance(stop.__context__, BrokenPipeError):
            return _reader_has_gone()
        raise
    except Exception as error:
        # Bad flags: click's exceptions, whose classes typer has moved from one version to the next.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())
    return code if isinstance(code, int) else 0


def _reader_has_gone() -> int:
    # Python would complain again when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return USAGE
