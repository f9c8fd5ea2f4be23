"""The README's commands and its Python, run as a reader would run them, with the bundled model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mlx_transfusion.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    }
)
COMMAND: Any = get_command(app)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n(.*?)```\n(<!-- not run by the tests: .*? -->)?", re.DOTALL)


def blocks(language: str, run: bool = True) -> list[str]:
    """Code blocks of a language; `run` says whether the README lets the tests run them."""
    return [body for kind, body, skip in BLOCK.findall(README) if kind == language and bool(skip) != run]


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def commands(run: bool = True) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh", run) for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "mlx-transfusion"]


def test_commands_run_in_their_order(tmp_path: Path) -> None:
    assert len(commands()) >= 6
    for arguments in commands():
        done = python(tmp_path, "-m", "mlx_transfusion", *arguments)
        assert done.returncode == 0, f"mlx-transfusion {shlex.join(arguments)}\n{done.stderr}"
    assert {p.name for p in tmp_path.glob("*.png")} >= {"face.png", "again.png"}


def test_long_commands_name_files_that_exist() -> None:
    files = [word for line in commands(run=False) for word in line if word.startswith("examples/")]
    assert files
    for file in files:
        assert (ROOT / file).is_file()


def parse(arguments: list[str]) -> None:
    """Read a command line without running it. Raises KeyError for an unknown verb, click's error for bad flags."""
    command = COMMAND
    while hasattr(command, "commands"):
        verb, *arguments = arguments
        command = command.commands[verb]
    command.make_context(verb, arguments)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documented_commands_have_verbs_and_flags_that_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for body in (body for kind, body, _ in BLOCK.findall(text) if kind == "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            line = re.sub(r" \[(--[^]]+)\]", r" \1", line)  # [--flag]: optional
            line = re.sub(r" \$\([^)\"]+\)", " FILE", line)
            words = shlex.split(line, comments=True)
            if "mlx-transfusion" in words:
                parse(words[words.index("mlx-transfusion") + 1 :])


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--stepz"):
        parse(["generate", "x", "--stepz", "3"])
    with pytest.raises(KeyError, match="tune"):
        parse(["tokenizer", "tune"])


def test_python_runs(tmp_path: Path) -> None:
    for block in blocks("python"):
        done = python(tmp_path, "-c", block)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "heart.png").is_file()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_first_two_commands_are_make_targets(target: str) -> None:
    first = README.index("```sh")
    assert f"make {target}\n" in README[first : README.index("```", first + 3)]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
