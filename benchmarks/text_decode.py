"""Text beside mlx-lm on the same weights: `python benchmarks/text_decode.py SmolLM2-135M-Instruct.Q4_1.gguf`.

Two folders are made of the file and read by both: its numbers in float32, and as they are (4 bits, embedding 8) with
float32 scales, for in half precision a CPU takes minutes. For each folder a process of each side loads it and warms
up; then they take turns, measurement by measurement (A B A B), both on the BLAS that mlx-transfusion finds:

load          seconds from the folder to evaluated weights and a tokenizer, without imports; measured once
prefill       tokens a second of a prompt of --prompt-tokens, to its first token
first token   seconds to the first token of a prompt of 17
decode        tokens a second of the --tokens after the first one, of the likeliest text
batch of 8    tokens a second of 8 such texts at once (`write_batch`; mlx-lm's `batch_generate`)

Ours are the public functions, `complete` and `write_batch`, with text and stop rules; theirs `stream_generate`.
Ours reads 4 bits on a CPU by expanding them, which is our default there. Ratios above 1 mean that ours is faster:
"best" compares the best turns of both, which a busy machine disturbs least, and the others turn with turn. The same
ratio of processor seconds stands beside it. --json prints all of it as JSON and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
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
MEASURES = ("prefill", "first token", "decode", "batch of 8")
"""Taken in turns, --rounds times each."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--weights", nargs="+", choices=("float32", "4 bits"), default=["float32", "4 bits"])
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has mlx-lm")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, folder = arguments.worker
        work(side, Path(folder), arguments.tokens, arguments.prompt_tokens)
        return
    if arguments.gguf is None:
        parser.error("name the GGUF file of a model")
    with tempfile.TemporaryDirectory() as top:
        folders = make_folders(arguments.gguf, Path(top))
        results = {name: summary(*measure(folders[name], arguments)) for name in arguments.weights}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(f"\n{name}\n" + "\n".join(report(result)))


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


Turn = dict[str, float]
"""Seconds, processor seconds and tokens of one measurement."""

Turns = dict[str, dict[str, list[Turn]]]
"""All measurements by name and side ("ours", "theirs")."""


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[Turns, bool]:
    """What both sides measure, taking turns; and whether they wrote the same text."""
    sizes = ["--tokens", str(arguments.tokens), "--prompt-tokens", str(arguments.prompt_tokens)]
    sides = {
        side: subprocess.Popen(
            [python, __file__, "--worker", side, str(folder), *sizes],
            env=os.environ | {"PYTHONPATH": str(TREE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side, python in (("ours", sys.executable), ("theirs", arguments.peer_python))
    }
    out: Turns = {name: {side: [] for side in sides} for name in ("load", *MEASURES)}
    try:
        for name in ("load", *MEASURES):
            for _ in range(1 if name == "load" else arguments.rounds):
                for side, process in sides.items():
                    out[name][side].append(ask(process, name))
        texts = {ask(process, "text")["text"].strip() for process in sides.values()}
    finally:
        for process in sides.values():
            process.kill()
            process.communicate()
    return out, len(texts) == 1


def ask(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Have a worker measure something."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit(f"a worker ended before it had measured {name}")


def summary(turns: Turns, same_text: bool) -> dict[str, Any]:
    """What --json prints of one folder: {"measures": {name: ...}, "batch gain": ..., "same text": ...}.

    Of each measurement: "unit", the best of "ours" and "theirs", "ratio" of the bests (above 1: ours is faster),
    "ratios" (turn with turn, sorted), "processor ratio", and "turns", as they were taken.
    """
    measures: dict[str, dict[str, Any]] = {}
    for name, sides in turns.items():
        seconds = {side: [t["seconds"] / t["tokens"] for t in taken] for side, taken in sides.items()}
        processor = {side: min(t["processor"] / t["tokens"] for t in taken) for side, taken in sides.items()}
        best = {side: min(values) for side, values in seconds.items()}
        rate = name not in SECONDS
        measures[name] = {
            "unit": "tokens/s" if rate else "s",
            **{side: 1 / value if rate else value for side, value in best.items()},
            "ratio": best["theirs"] / best["ours"],
            "ratios": sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)),
            "processor ratio": processor["theirs"] / processor["ours"],
            "turns": sides,
        }
    gain = measures["batch of 8"]["ours"] / measures["decode"]["ours"]
    return {"measures": measures, "batch gain": gain, "same text": same_text}


SECONDS = ("load", "first token")
"""Told in seconds, where less is better; all others in tokens a second."""


def report(result: dict[str, Any]) -> list[str]:
    """A summary as a table for people."""
    lines = [
        "| measurement | ours | mlx-lm | times as fast (turns) | by processor |",
        "|---|---|---|---|---|",
    ]
    for name, m in result["measures"].items():
        lines.append(
            f"| {name} | {m['ours']:.3g} {m['unit']} | {m['theirs']:.3g} {m['unit']} | {m['ratio']:.2f}x "
            f"({m['ratios'][0]:.2f} to {m['ratios'][-1]:.2f}) | {m['processor ratio']:.2f}x |"
        )
    gain, same = result["batch gain"], result["same text"]
    return [*lines, f"8 texts at once: {gain:.2f} times the tokens a second of one; same text: {same}"]


Stream = Callable[[list[int], int], Iterator[tuple[int, str]]]
"""Prompt and number of tokens -> (tokens so far, new text), as they come."""


def work(side: str, folder: Path, tokens: int, prompt_tokens: int) -> None:
    """One side: measures what a line of the input names, and prints it as a line of JSON."""
    import mlx_transfusion  # noqa: F401  (finds a BLAS for mlx-lm's process too)

    load = load_ours if side == "ours" else load_theirs
    load_imports(side)
    begin = now()
    stream, batch = load(folder)
    loaded = turn(begin, now(), 1)
    prompt = (STORY * prompt_tokens)[:prompt_tokens]
    for ids in (FIRST, prompt):  # warm up
        timed(stream, ids, 4)
    batch([STORY] * 8, 2)
    text = ""
    for line in sys.stdin:
        name, begin = line.strip(), now()
        answer: dict[str, Any] = {"text": text}
        if name == "load":
            answer = loaded
        elif name == "prefill":
            answer = turn(begin, timed(stream, prompt, 1)[0], prompt_tokens)
        elif name == "first token":
            answer = turn(begin, timed(stream, FIRST, 1)[0], 1)
        elif name == "decode":
            first, last, count, text = timed(stream, STORY, tokens)
            answer = turn(first, last, count - 1)
        elif name == "batch of 8":
            count = batch([STORY] * 8, tokens)
            answer = turn(begin, now(), count)
        print(json.dumps(answer), flush=True)


Instant = tuple[float, float]
"""The clock, and the processor seconds that this process has used."""


def now() -> Instant:
    return time.perf_counter(), time.process_time()


def turn(begin: Instant, end: Instant, tokens: int) -> Turn:
    return {"seconds": end[0] - begin[0], "processor": end[1] - begin[1], "tokens": tokens}


def timed(stream: Stream, prompt: list[int], tokens: int) -> tuple[Instant, Instant, int, str]:
    """When the first and the last token came, how many they are, and the text."""
    times, count, text = [], 0, ""
    for count, piece in stream(prompt, tokens):  # noqa: B007
        times.append(now())
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
