"""Chat templates: the turns of a conversation as the token ids that a chat model was trained on.

A template is a small program in Jinja, written by whoever published the model. It runs in Jinja's sandbox, where it
can reach nothing but the messages and change nothing at all. What the user says cannot open or close a turn: special
tokens in it are read as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_files import read_json
from mlx_transfusion.tokenizer import Tokenizer

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
DEFAULT_NAME = "default"
"""Of the template that is meant where a model has several."""
FIRST_STAND_IN = 0xF0000
"""First of the characters for private use: one stands for a special token while the template runs."""

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class ChatTemplate:
    """The chat template of a model folder."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """tokens: bos_token, eos_token, ... as they are written. Raises UserError for a broken template."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._where, self._tokens = where, dict(tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is broken: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Of a model folder: chat_template.jinja, or the one in tokenizer_config.json; None without either.

        Raises UserError for files that cannot be read.
        """
        file = folder / SETTINGS_FILE
        settings = read_json(file) if file.is_file() else {}
        tokens = {key: _written(value) for key, value in settings.items() if key.endswith("_token")}
        own = folder / TEMPLATE_FILE
        if own.is_file():
            try:
                return cls(own.read_text(encoding="utf-8"), tokens, str(own))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{own}: cannot read the chat template: {error}") from error
        source = settings.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get(DEFAULT_NAME)
        return cls(source, tokens, str(file)) if isinstance(source, str) else None

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """The conversation as text, specials written out. answer: end where the model begins to speak.

        Raises UserError when the template refuses the messages or fails.
        """
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=answer, **self._tokens
            )
        except Exception as error:  # a template may fail in any way that a program can
            reason = " ".join(str(error).split())
            raise UserError(f"{self._where}: the chat template fails on these messages: {reason}") from error

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], answer: bool = True) -> list[int]:
        """The conversation as token ids. Raises UserError as `render`."""
        said = "".join(m["content"] for m in messages)
        special = [token for token in tokenizer.control_tokens if token in said]
        if not special:
            return tokenizer.encode_template(self.render(messages, answer))
        stand_ins = _stand_ins(special, said)
        hidden = [{**m, "content": _replaced(m["content"], stand_ins)} for m in messages]
        ids: list[int] = []
        for part in _split(self.render(hidden, answer), stand_ins):
            back = [token for token, sign in stand_ins.items() if sign == part]
            ids += tokenizer.encode(back[0]) if back else tokenizer.encode_template(part)
        return ids


def chat_ids(
    folder: Path, tokenizer: Tokenizer, prompt: str, system_prompt: str | None = None, name: str = ""
) -> list[int]:
    """Token ids of a user's first turn, up to where the model answers.

    Raises UserError when the model `name` in `folder` has no chat template.
    """
    template = ChatTemplate.load(folder)
    if template is None:
        raise UserError(f"model {name or folder} has no chat template: leave out --chat")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return template.encode(tokenizer, [*system, {"role": "user", "content": prompt}])


def _stand_ins(special: list[str], said: str) -> dict[str, str]:
    """Special tokens, the longest first -> characters that nobody has said."""
    free = (chr(code) for code in count(FIRST_STAND_IN) if chr(code) not in said)
    return {token: next(free) for token in sorted(special, key=len, reverse=True)}


def _replaced(text: str, stand_ins: Mapping[str, str]) -> str:
    for token, sign in stand_ins.items():
        text = text.replace(token, sign)
    return text


def _split(text: str, stand_ins: Mapping[str, str]) -> list[str]:
    """The text between the signs, and the signs."""
    signs, parts = set(stand_ins.values()), [""]
    for character in text:
        if character in signs:
            parts += [character, ""]
        else:
            parts[-1] += character
    return [part for part in parts if part]


def _written(value: Any) -> str:
    """How a token is written, which newer folders wrap in an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without Jinja's escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(reason: str) -> NoReturn:
    raise UserError(reason)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
