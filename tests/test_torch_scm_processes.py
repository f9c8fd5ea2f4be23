"""Distillation by two processes, whose parts of a step may lack pictures or text, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from tiny_training import write_run  # noqa: E402
from torch_tools import finish, job, run_losses, start  # noqa: E402

from mlx_transfusion.tokenizer import Tokenizer  # noqa: E402


def test_distillation_does_not_depend_on_the_number_of_processes(
    tiny_model_dir: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Forward mode runs through sharded weights, and every process gathers the same ones in the same order."""
    toml = write_run(tmp_path / "data", tiny_tokenizer)
    text = toml.read_text()
    settings = f'[consistency]\nteacher = "{tiny_model_dir}"\nguidance = 2.0\ntangent_warmup = 2\n'
    toml.write_text(text[: text.index("[model]")] + settings + text[text.index("[[data.train]]") :])
    outputs = [tmp_path / "one", tmp_path / "two"]
    finish(
        start(
            *(
                job(toml, output, count, "steps=3", "batch_size=8", f"accumulate={count}")
                for count, output in enumerate(outputs, 1)
            )
        )
    )
    found = [run_losses(output) for output in outputs]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
