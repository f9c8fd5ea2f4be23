"""`mlx-transfusion tokenizer`: train a SentencePiece tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")


@app.callback()
def _group() -> None:
    """Train a tokenizer."""
    # A callback keeps `train` a subcommand: typer folds an app with one command into that command.


@app.command()
def train(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help='.txt (one text a line) or .jsonl files with "text".'),
    ],
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Number of tokens, specials and bytes included.")
    ] = 2048,
    output: Annotated[Path, typer.Option(help="Where to write the SentencePiece model.")] = Path(
        "tokenizer.model"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Train a lower-casing unigram SentencePiece model with byte fallback."""
    from mlx_transfusion.errors import UserError
    from mlx_transfusion.tokenizer import train_sentencepiece
    from mlx_transfusion.training.rows import read_texts

    if output.is_dir():
        raise UserError(f"{output}: is a folder: give a file name with --output")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists already: choose another --output or give --overwrite")
    train_sentencepiece(read_texts(inputs), output, vocab_size)
    typer.echo(str(output))
