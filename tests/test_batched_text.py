"""Several texts at once are the texts one by one."""

from __future__ import annotations

import llama_tools as tools
import pytest
from convert_package import module

from mlx_transfusion import model_io
from mlx_transfusion.batched_text import write_batch
from mlx_transfusion.errors import UserError
from mlx_transfusion.interleave import Tokens, complete
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.settings import GenerationSettings

run, quantize, sources = (module(name) for name in ("run", "quantize", "sources"))
PROMPTS = ["a", "a red heart", "b!", "blue star and a green moon", "zz"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    top = tmp_path_factory.mktemp("batch")
    model = tools.random_llama(tools.config(max_position_embeddings=40), scale=0.5)
    folder = tools.hf_folder(top / "hf", model.config, model)
    return model_io.load(run.convert(run.plan_of(sources.Source(folder), quantize.Options()), top / "m"))


def alone(loaded: Loaded, prompt: str, seed: int, settings: GenerationSettings) -> tuple[str, str]:
    events = list(complete(loaded, prompt, seed, settings))
    return "".join(e.text for e in events[:-1]), events[-1].reason  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_tokens=10),
        GenerationSettings(max_tokens=200),  # until there is no more room
        GenerationSettings(max_tokens=10, temperature=1.0, top_k=50),
        GenerationSettings(max_tokens=10, temperature=0.7, repetition_penalty=1.3),
        GenerationSettings(max_tokens=20, temperature=3.0, stop=("e", "q")),
    ],
)
def test_each_row_is_what_it_is_alone(loaded: Loaded, settings: GenerationSettings) -> None:
    together = write_batch(loaded, PROMPTS, 7, settings)
    one_by_one = [alone(loaded, prompt, 7 + i, settings) for i, prompt in enumerate(PROMPTS)]
    assert [(w.text, w.reason) for w in together] == one_by_one


def test_rows_end_at_different_times(loaded: Loaded) -> None:
    settings = GenerationSettings(max_tokens=20, temperature=3.0, stop=("e", "q", "0"))
    written = write_batch(loaded, PROMPTS * 2, 1, settings)
    assert {w.reason for w in written} == {"stop", "length"}
    assert len({w.tokens for w in written}) > 2


def test_bos_is_read_once(loaded: Loaded) -> None:
    bos = loaded.tokenizer.encode("a")
    assert write_batch(loaded, [Tokens(tuple(bos))])[0].text == write_batch(loaded, ["a"])[0].text


def test_bad_prompts(loaded: Loaded) -> None:
    assert write_batch(loaded, []) == []
    with pytest.raises(UserError, match="prompt 2 is empty"):
        write_batch(loaded, ["a", ""])
    with pytest.raises(UserError, match="prompt 1 is too long: 100 tokens"):
        write_batch(loaded, ["a" * 100])
