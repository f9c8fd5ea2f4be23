"""Text to token ids and back: SentencePiece and tokenizer.json behind one small interface."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from mlx_transfusion.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
MAX_LINE_BYTES = 1 << 24
BOI_PIECE, EOI_PIECE = "<boi>", "<eoi>"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens for structure, never for text; None where a vocabulary has no such token.

    boi, eoi: begin, end of image (Transfusion, 3.1). pad, bos and eos may be one token.
    """

    pad: int | None = 0
    bos: int | None = 1
    eos: int | None = 2
    unk: int | None = 3
    boi: int | None = 4
    eoi: int | None = 5

    def check(self, vocab_size: int, where: str) -> None:
        """Raises UserError for an id outside the vocabulary, and for tokens of pictures that are not their own."""
        given = [i for i in astuple(self) if i is not None]
        if bad := [i for i in given if not 0 <= i < vocab_size]:
            raise UserError(f"{where}: special token id {bad[0]} is outside the vocabulary of {vocab_size}")
        for name, i in (("boi", self.boi), ("eoi", self.eoi)):
            if i is not None and given.count(i) > 1:
                raise UserError(f"{where}: {name} must be an id of its own, and {i} is another special too")


class _Backend(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def encode_template(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def size(self) -> int: ...
    def control(self) -> dict[str, int]: ...


class _SentencePiece:
    def __init__(self, data: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(data)

    def encode(self, text: str) -> list[int]:
        return list(self.processor.encode(text))

    def encode_template(self, text: str) -> list[int]:
        control = self.control()
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, control)) + ")", text):
            ids += [control[part]] if part in control else self.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.processor.decode(ids))

    def size(self) -> int:
        return int(self.processor.get_piece_size())

    def control(self) -> dict[str, int]:
        sp = self.processor
        return {sp.id_to_piece(i): i for i in range(sp.get_piece_size()) if sp.is_control(i)}

    def special(self) -> SpecialIds:
        sp = self.processor
        boi, eoi = sp.piece_to_id(BOI_PIECE), sp.piece_to_id(EOI_PIECE)
        if not (sp.is_control(boi) and sp.is_control(eoi)):
            raise UserError(
                f"the tokenizer has no control symbols {BOI_PIECE} and {EOI_PIECE}: give their ids in the "
                "model's config, or train a tokenizer with `mlx-transfusion tokenizer train`"
            )
        return SpecialIds(sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), boi, eoi)


class _HuggingFace:
    def __init__(self, data: bytes) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        # Otherwise a user who writes "<boi>" opens an image.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_template(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def control(self) -> dict[str, int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}


class Tokenizer:
    """Text <-> token ids. Build it with `Tokenizer.load`."""

    def __init__(self, backend: _Backend, special: SpecialIds, data: bytes, file_name: str) -> None:
        self._backend = backend
        self._data = data
        self._file_name = file_name
        self.special = special
        self.vocab_size = backend.size()
        special.check(self.vocab_size, file_name)
        self._structural = frozenset(i for i in astuple(special) if i is not None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], special: SpecialIds | None = None) -> Tokenizer:
        """Read `tokenizer.model` (SentencePiece), `tokenizer.json` (HF tokenizers), or a folder with one.

        special: the structural ids. A SentencePiece model of ours knows its own; a `tokenizer.json` needs
        them from the model's config. Raises UserError for a missing, corrupt or unsuitable file.
        """
        file = _find_file(Path(path))
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot read the tokenizer: {error.strerror}") from error
        is_json = file.suffix == ".json"
        try:
            backend = _HuggingFace(data) if is_json else _SentencePiece(data)
        except Exception as error:  # both libraries raise bare RuntimeError / Exception for corrupt data
            kind = "tokenizer.json" if is_json else "SentencePiece model"
            raise UserError(f"{file}: not a valid {kind}: restore the file or train it again") from error
        if special is None:
            if isinstance(backend, _HuggingFace):
                raise UserError(
                    f"{file}: a tokenizer.json needs the special token ids (pad ... eoi) of the config"
                )
            special = backend.special()
        return cls(backend, special, data, HUGGINGFACE_FILE if is_json else SENTENCEPIECE_FILE)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no special is added, and none comes out of user text such as "<boi>"."""
        # Lone surrogates (undecodable command-line bytes) are no Unicode text: "?" stands for them.
        ids = self._backend.encode(text.encode("utf-8", "replace").decode("utf-8"))
        control = self._structural - {self.special.unk}
        return [i for i in ids if i not in control]

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of its file."""
        return hashlib.sha256(self._data).hexdigest()[:16]

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """How the vocabulary's special tokens are written -> their ids: what a chat template is made of."""
        return {text: i for text, i in self._backend.control().items() if text}

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are written out, as a chat template gives it."""
        return self._backend.encode_template(text.encode("utf-8", "replace").decode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special ids skipped. Bytes that are no UTF-8 become U+FFFD.

        The text of a growing sequence is the decode of all of it: the first word of a lone decode loses the
        space before it. Raises UserError for an id outside the vocabulary.
        """
        outside = [int(i) for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise UserError(
                f"token id {outside[0]} is outside the tokenizer's vocabulary of {self.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        return self._backend.decode([int(i) for i in ids if i not in self._structural])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tokenizer file into `folder`, byte for byte as it was loaded; returns its path."""
        target = Path(folder) / self._file_name
        _write_atomically(target, self._data)
        return target


def train_sentencepiece(texts: Iterable[str], output: str | os.PathLike[str], vocab_size: int) -> None:
    """Train a unigram SentencePiece model on `texts` and write it to `output`; equal input gives equal bytes.

    Text is lower-cased and NFKC-normalised (`nmt_nfkc_cf`), so "Red Heart" and "red heart" are one caption.
    Characters outside the vocabulary fall back to bytes: nothing encodes to unk. Ids: see `SpecialIds`.
    Raises UserError for an empty corpus, and for a vocabulary the corpus cannot fill or that is too small.
    """
    import sentencepiece

    lines = [clean for text in texts if (clean := " ".join(text.split()))]
    if not lines:
        raise UserError("tokenizer training: the input holds no text: give files with text")
    model = io.BytesIO()
    ids = SpecialIds()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),  # no input path and no model_prefix: both would stand in the model
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=True,
            split_digits=True,
            pad_id=ids.pad,
            bos_id=ids.bos,
            eos_id=ids.eos,
            unk_id=ids.unk,
            pad_piece="<pad>",
            control_symbols=[BOI_PIECE, EOI_PIECE],  # take the next free ids: 4 and 5
            num_threads=1,  # sums of floats depend on how the threads share the sentences
            max_sentence_length=MAX_LINE_BYTES,  # longer lines are silently dropped, by default over 4192
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(_explain_training_error(str(error), vocab_size)) from error
    _write_atomically(Path(output), model.getvalue())


def _explain_training_error(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"vocabulary size {vocab_size} is too large for this corpus: "
            f"give more text or a vocabulary of at most {found[1]}"
        )
    if re.search(r"required_chars|smaller than|too small", message, re.IGNORECASE):
        numbers = re.search(r"(\d+) vs (\d+)", message)
        need = f"at least {numbers[2]}" if numbers else "a larger one"
        return (
            f"vocabulary size {vocab_size} is too small (bytes and characters alone need more): give {need}"
        )
    return f"SentencePiece could not train a vocabulary of {vocab_size}: {' '.join(message.split())}"


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in (SENTENCEPIECE_FILE, HUGGINGFACE_FILE):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no {SENTENCEPIECE_FILE} and no {HUGGINGFACE_FILE} in this folder")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    return path


def _write_atomically(target: Path, data: bytes) -> None:
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o644)  # NamedTemporaryFile makes files that only their owner can read
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"{target}: cannot write: {error.strerror}") from error
