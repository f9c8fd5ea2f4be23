"""Text beside mlx-lm on the same weights: `python benchmarks/text_decode.py SmolLM2-135M-Instruct.Q4_1.gguf`.

Two folders are made of the file and read by both: its numbers in float32, and as they are (4 bits, embedding 8) with
float32 scales, for in half precision a CPU takes minutes. Every round starts a fresh process for each side, one
after the other, both on the BLAS that mlx-transfusion finds. Each loads, warms up, and writes the likeliest text:

load          the folder to evaluated weights and a tokenizer, without imports
prefill       tokens a second of a prompt of --prompt-tokens, to its first token
first token   seconds to the first token of a prompt of 17
decode        tokens a second of the --tokens after the first one
batch of 8    tokens a second of 8 such texts at once (`write_batch`; mlx-lm's `batch_generate`)

Ours are the public functions, `complete` and `write_batch`, with text and stop rules; theirs `stream_generate`.
Ours reads 4 bits on a CPU by expanding them, which is our default there. Ratios above 1 mean that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[1]
FIRST = [1, 4093, 198, 19161, 582, 6330, 563, 253, 2382, 1911, 30, 2, 198, 1, 520, 9531, 198]
"""A user's turn: "Write one sentence about a red heart."."""
STORY = [6403, 1980, 253, 655, 28]
"""The beginning of a text that goes on for long: "Once upon a time,"."""
MEASURES = ("load", "prefill", "first token", "decode", "batch of 8")
SECONDS = ("load", "first token")
"""Where less is better."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has mlx-lm")
    parser.add_argument("--output", type=Path, help="every timing, as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, folder = arguments.worker
        print(json.dumps(work(side, Path(folder), arguments.tokens, arguments.prompt_tokens)))
        return
    with tempfile.TemporaryDirectory() as top:
        folders = make_folders(arguments.gguf, Path(top))
        results = {name: measure(folder, arguments) for name, folder in folders.items()}
    for name, rounds in results.items():
        print(f"\n{name}\n" + "\n".join(report(rounds)))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


def make_folders(gguf: Path, top: Path) -> dict[str, Path]:
    """The file's model in float32 and as it is."""
    sys.path.insert(0, str(TREE))
    import mlx_transfusion  # noqa: F401, I001  (before mlx)
    import mlx.core as mx
    from convert.quantize import Options
    from convert.run import convert, plan_of
    from convert.sources import Source

    from mlx_transfusion.model_io import load, save_model

    packed = convert(plan_of(Source(gguf), Options(dtype=mx.float32)), top / "4-bit")
    whole = top / "float32"
    with mx.stream(mx.cpu):
        loaded = load(packed)
    save_model(whole, loaded.model, loaded.tokenizer, dtype=mx.float32)
    settings = "tokenizer_config.json"
    (whole / settings).write_bytes((packed / settings).read_bytes())
    return {"float32": whole, "4 bits": packed}


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Every round's numbers of both sides."""
    sizes = ["--tokens", str(arguments.tokens), "--prompt-tokens", str(arguments.prompt_tokens)]
    rounds = []
    for _ in range(arguments.rounds):
        one: dict[str, dict[str, Any]] = {}
        for side, python in (("ours", sys.executable), ("theirs", arguments.peer_python)):
            command = [python, __file__, "--worker", side, str(folder), *sizes]
            environment = os.environ | {"PYTHONPATH": str(TREE)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            one[side] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(one)
    return rounds


def report(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Medians over rounds, and ratios that are taken within a round."""
    lines = ["| measurement | ours | mlx-lm | times as fast |", "|---|---|---|---|"]
    for name in MEASURES:
        ours, theirs = ([r[side][name] for r in rounds] for side in ("ours", "theirs"))
        pairs = zip(ours, theirs, strict=True)
        ratios = sorted(b / a if name in SECONDS else a / b for a, b in pairs)
        unit = "s" if name in SECONDS else "tokens/s"
        lines.append(
            f"| {name} | {statistics.median(ours):.3g} {unit} | {statistics.median(theirs):.3g} {unit} | "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    gain = statistics.median(r["ours"]["batch of 8"] / r["ours"]["decode"] for r in rounds)
    same = all(r["ours"]["text"].strip() == r["theirs"]["text"].strip() for r in rounds)
    return [*lines, f"8 texts at once: {gain:.2f} times the tokens a second of one; same text: {same}"]


Stream = Callable[[list[int], int], Iterator[tuple[int, str]]]
"""Prompt and number of tokens -> (tokens so far, new text), as they come."""


def work(side: str, folder: Path, tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """All measurements of one side, in this process."""
    import mlx_transfusion  # noqa: F401  (finds a BLAS for mlx-lm's process too)

    load = load_ours if side == "ours" else load_theirs
    load_imports(side)
    begin = time.perf_counter()
    stream, batch = load(folder)
    out: dict[str, Any] = {"load": time.perf_counter() - begin}
    prompt = (STORY * prompt_tokens)[:prompt_tokens]
    for _ in stream(prompt, 4):  # warm up
        pass
    out["prefill"] = prompt_tokens / timed(stream, prompt, 1)[0]
    out["first token"] = timed(stream, FIRST, 1)[0]
    first, last, count, text = timed(stream, STORY, tokens)
    out["decode"], out["text"] = (count - 1) / (last - first), text
    begin = time.perf_counter()
    written = batch([STORY] * 8, tokens)
    out["batch of 8"] = written / (time.perf_counter() - begin)
    return out


def timed(stream: Stream, prompt: list[int], tokens: int) -> tuple[float, float, int, str]:
    """Seconds to the first and to the last token, tokens, and the text."""
    begin, times, count, text = time.perf_counter(), [], 0, ""
    for count, piece in stream(prompt, tokens):  # noqa: B007
        times.append(time.perf_counter() - begin)
        text += piece
    return times[0], times[-1], count, text


def load_imports(side: str) -> None:
    """Nobody loads a model without them, but they are no loading of a model."""
    if side == "ours":
        import tokenizers  # noqa: F401

        import mlx_transfusion.batched_text  # noqa: F401
    else:
        import mlx_lm  # noqa: F401


def load_ours(folder: Path) -> tuple[Stream, Callable[[list[list[int]], int], int]]:
    from mlx_transfusion.batched_text import write_batch
    from mlx_transfusion.events import Token
    from mlx_transfusion.interleave import Tokens, complete
    from mlx_transfusion.model_io import load
    from mlx_transfusion.settings import GenerationSettings

    loaded = load(folder)

    def stream(prompt: list[int], tokens: int) -> Iterator[tuple[int, str]]:
        count = 0
        for event in complete(loaded, [Tokens(tuple(prompt))], 0, GenerationSettings(max_tokens=tokens)):
            if isinstance(event, Token):
                count += len(event.ids)
                yield count, event.text

    def batch(prompts: list[list[int]], tokens: int) -> int:
        given = [Tokens(tuple(p)) for p in prompts]
        return sum(w.tokens for w in write_batch(loaded, given, 0, GenerationSettings(max_tokens=tokens)))

    return stream, batch


def load_theirs(folder: Path) -> tuple[Stream, Callable[[list[list[int]], int], int]]:
    from mlx_lm import batch_generate, load, stream_generate

    model, tokenizer = load(str(folder))[:2]

    def stream(prompt: list[int], tokens: int) -> Iterator[tuple[int, str]]:
        for answer in stream_generate(model, tokenizer, prompt, max_tokens=tokens):
            yield answer.generation_tokens, answer.text

    def batch(prompts: list[list[int]], tokens: int) -> int:
        return batch_generate(model, tokenizer, prompts, max_tokens=tokens).stats.generation_tokens

    return stream, batch


if __name__ == "__main__":
    main()
