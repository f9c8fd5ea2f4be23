"""The tokenizer in a GGUF file's metadata as a tokenizer.json and a tokenizer_config.json.

Two kinds: byte-level BPE with its merges ("gpt2": SmolLM, Llama 3, Qwen), whose pieces depend on a way of splitting
text that the file only names; and SentencePiece's BPE ("llama": Llama 2, TinyLlama), whose merges follow from the
pieces' scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mlx_transfusion.errors import UserError

UNKNOWN, CONTROL, USER = 2, 3, 4
"""Values of tokenizer.ggml.token_type besides 1 (normal), 5 (unused) and 6 (byte)."""
SPACE = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "llama-bpe": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",
    "qwen2": rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_OTHERS}",
}
"""tokenizer.ggml.pre -> what a piece of text may be, for those that are not GPT-2's."""


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes | Path]:
    """tokenizer.json and tokenizer_config.json as bytes. Raises UserError for an unknown or broken tokenizer."""
    tokens = _list(metadata, "tokens", where)
    types = (
        _list(metadata, "token_type", where) if "tokenizer.ggml.token_type" in metadata else [1] * len(tokens)
    )
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: the tokenizer's lists do not fit each other: download the file again")
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            made = _byte_level(metadata, tokens, where)
        elif kind == "llama":
            made = _sentencepiece(metadata, tokens, types, where)
        else:
            raise UserError(f'{where}: the tokenizer is of kind "{kind}", expected gpt2 or llama')
        _add_special(made, tokens, types)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: the tokenizer cannot be built: {' '.join(str(error).split())}") from error
    if made.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise UserError(f"{where}: the tokenizer's lists do not fit each other: download the file again")
    settings = json.dumps(_settings(metadata, tokens), indent=2, ensure_ascii=False)
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings.encode()}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: str) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", where)]
    out = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre in ("default", "gpt-2"):
        out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        out.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        out.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if pre == "qwen2":
            out.normalizer = normalizers.NFC()
    else:
        known = ", ".join(("default", "gpt-2", "smollm", *SPLITS))
        raise UserError(
            f'{where}: the tokenizer splits text as "{pre}", expected one of {known}: name the original '
            "tokenizer.json with --tokenizer"
        )
    out.decoder = decoders.ByteLevel()
    return out


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> tokenizers.Tokenizer:
    scores = _list(metadata, "scores", where)
    if len(scores) != len(tokens):
        raise UserError(f"{where}: the tokenizer's lists do not fit each other: download the file again")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    out = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges_of(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    out.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    out.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return out


def merges_of(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE, first the most urgent: pairs of pieces that make a piece, by its score."""
    normal = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (1, USER)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in normal.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in normal and right in normal:
                ranked.append((-scores[i], normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_special(made: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that text is searched for before it is split; control tokens never come out of text."""
    for wanted, special in ((CONTROL, True), (UNKNOWN, True), (USER, False)):
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted and token]
        added = [AddedToken(token, special=special, normalized=False) for token in chosen]
        (made.add_special_tokens if special else made.add_tokens)(added)


def _settings(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json: as other libraries read it too."""
    out: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            out[f"{name}_token"] = tokens[i]
    out["add_bos_token"] = adds_bos(metadata)
    template = metadata.get("tokenizer.chat_template")
    return out | ({"chat_template": template} if isinstance(template, str) else {})


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with BOS: what the file says, or what is usual for its kind of tokenizer."""
    usual = (
        metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


def _list(metadata: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: its metadata holds no tokenizer.ggml.{name}: name a tokenizer with --tokenizer"
        )
    return value
