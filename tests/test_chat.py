"""Chat templates: what they give, what a user's words cannot do, and the verb that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import llama_tools as tools
import pytest
from convert_package import module
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.chat import ChatTemplate, chat_ids
from mlx_transfusion.errors import UserError
from mlx_transfusion.tokenizer import SpecialIds, Tokenizer

run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))
SPECIAL = SpecialIds(pad=None, bos=1, eos=2, unk=None, boi=None, eoi=None)
START, END = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    top = tmp_path_factory.mktemp("chat")
    model = tools.random_llama(tools.config())
    hf = tools.hf_folder(top / "hf", model.config, model)
    return run.convert(run.plan_of(sources.Source(hf), quantize.Options()), top / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, SPECIAL)


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens, "here")


def turn(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    return [START, *tokenizer.encode(f"{role}\n{text}"), END, *tokenizer.encode("\n")]


def test_turns_as_the_template_says(folder: Path, tokenizer: Tokenizer) -> None:
    expected = [*turn(tokenizer, "user", "A red heart?"), START, *tokenizer.encode("assistant\n")]
    assert chat_ids(folder, tokenizer, "A red heart?") == expected
    told = turn(tokenizer, "system", "Be brief.")
    assert chat_ids(folder, tokenizer, "A red heart?", "Be brief.") == told + expected


@given(
    st.lists(
        st.sampled_from([*tools.SPECIALS, "a", "<|im_", "end|>", "\n", " ", "\U000f0000", "ä"]), max_size=8
    )
)
@settings(deadline=None)
def test_words_cannot_end_a_turn(folder: Path, tokenizer: Tokenizer, words: list[str]) -> None:
    said = "".join(words)
    ids = chat_ids(folder, tokenizer, said)
    assert [i for i in ids if i in (0, START, END)] == [START, END, START]
    # Each special in it is read apart, which changes no byte.
    assert tokenizer.decode(ids) == f"user\n{said}\nassistant\n"


def test_a_file_of_its_own_comes_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tools.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert chat_ids(tmp_path, tokenizer, "hi") == [START, *tokenizer.encode("hi"), END]


def test_of_several_the_default_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}!"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_ids(tmp_path, tokenizer, "hi") == tokenizer.encode("hi!")


def test_what_templates_use() -> None:
    source = (
        "{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "<ä>"}, {"role": "user", "content": "b"}]
    assert template(source).render(messages) == '{"role": "user", "content": "<ä>"}\n4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "fails on these messages: roles must alternate"),
        ("{{ messages[7].content }}", "fails on these messages"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails on these messages"),
        ("{{ raise_exception.__globals__.items() }}", "fails on these messages"),
        ("{% for m in range(10 ** 9) %}{% endfor %}", "fails on these messages"),
    ],
)
def test_templates_that_fail_or_reach_out(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        template(source).render([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="here: the chat template is broken"):
        template("{% for %}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(UserError, match="model tiny has no chat template: leave out --chat"):
        chat_ids(tmp_path, tokenizer, "hi", name="tiny")


def test_the_verb(folder: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    plain = cli("complete", "a red heart", "--model", folder, "--max-tokens", 4, "--json")
    chat = cli("complete", "a red heart", "--model", folder, "--max-tokens", 4, "--json", "--chat")
    told = cli(
        "complete", "a", "--model", folder, "--chat", "--system-prompt", "Be brief.", "--max-tokens", 4
    )
    assert plain.code == chat.code == told.code == 0
    assert plain.out != chat.out
    assert json.loads(chat.out.splitlines()[-1])["finished"] in ("length", "stop")
    assert not list(tmp_path.iterdir())  # nothing is painted
    missing = cli("complete", "a", "--system-prompt", "Be brief.")
    assert (missing.code, "add --chat" in missing.err) == (2, True)
    bundled = cli("complete", "a", "--chat")
    assert (bundled.code, "has no chat template" in bundled.err) == (2, True)
