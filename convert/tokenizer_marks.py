"""Tokenizers of models whose structural tokens stand behind the text's, outside the tokenizer they were trained with.

The rest of the package finds every token in the tokenizer, so a converted folder holds one with these added; its text
tokens stay as they are. Without a tokenizer there is one whose words are the ids themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SpecialIds, Tokenizer

NO_IDS = SpecialIds(None, None, None, None, None, None)
CONTROL = 3
"""The type of a SentencePiece that is never text."""


def with_marks(file: Path, text_tokens: int, marks: Sequence[str]) -> tuple[str, bytes]:
    """A tokenizer file with `marks` as the tokens from `text_tokens` on: its name and content.

    Raises UserError for a broken file and one with more than `text_tokens` tokens.
    """
    tokenizer = Tokenizer.load(file, special=NO_IDS)
    size = tokenizer.vocab_size
    if size > text_tokens:
        raise UserError(
            f"{file}: the tokenizer has {size} tokens and the model {text_tokens} of text: use the tokenizer that "
            "the model was trained with"
        )
    names = [f"<|unused {i}|>" for i in range(size, text_tokens)] + list(marks)
    data = file.read_bytes()
    if file.suffix != ".json":
        return SENTENCEPIECE_FILE, data + b"".join(map(_piece, names))
    table = json.loads(data)
    table["added_tokens"] = list(table.get("added_tokens") or []) + _added(names, size)
    return HUGGINGFACE_FILE, json.dumps(table, ensure_ascii=False).encode()


def completed(
    files: Mapping[str, bytes | Path], text_tokens: int, marks: Sequence[str]
) -> dict[str, bytes | Path]:
    """Tokenizer files in which those that lack the marks have them; others stay. Raises UserError for broken ones."""
    out = dict(files)
    for name, file in files.items():
        if not name.endswith((".model", "tokenizer.json")) or not isinstance(file, Path):
            continue
        if Tokenizer.load(file, special=NO_IDS).vocab_size <= text_tokens:
            del out[name]
            out |= [with_marks(file, text_tokens, marks)]
    return out


def number_tokenizer(text_tokens: int, marks: Sequence[str]) -> tuple[str, bytes]:
    """A tokenizer.json for text such as "12 5 77", of ids below `text_tokens`: its name and content.

    Whatever is no number separates; a number that is too large is the first mark.
    """
    table = {
        "version": "1.0",
        "normalizer": {"type": "Replace", "pattern": {"Regex": "[^0-9]+"}, "content": " "},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {str(i): i for i in range(text_tokens)} | {marks[0]: text_tokens},
            "unk_token": marks[0],
        },
        "added_tokens": _added(marks, text_tokens),
    }
    return HUGGINGFACE_FILE, json.dumps(table).encode()


def _added(names: Sequence[str], first: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": first + i, "content": name, "special": True, **flags} for i, name in enumerate(names)]


def _piece(name: str) -> bytes:
    """One more entry of the list of pieces that a SentencePiece model is: appending to the file appends to it."""
    text = name.encode()
    message = b"\x0a" + _varint(len(text)) + text + b"\x15\0\0\0\0" + b"\x18" + _varint(CONTROL)
    return b"\x0a" + _varint(len(message)) + message


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])
