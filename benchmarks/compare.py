"""Every peer and every goal of speed in one run: `python benchmarks/compare.py`, about twelve minutes on two cores.

It writes docs/benchmarks.md (`--document`) and all timings as JSON (`--output`). On the CPU in float32:

transfusion   a training step (forward, backward, AdamW on 16 pairs of caption, 24 tokens, and picture, 64 patches of
              4x4 pixels in colour, with packing and noise and without reading files) and a guided picture (prompt, 16
              midpoint steps at guidance 3, pixels), beside transfusion-pytorch 0.20.0 and our PyTorch path, eager and
              compiled (its step alone)
matmul        the rate of plain products, by numpy and by MLX: the limit of all this
student       the bundled models: two steps beside 16 guided ones, batches of pictures, sCM's tangent
prefix        a denoising step behind a short and a long prefix
text          text_decode.py beside mlx-lm, once (needs --gguf)
diffusers     decoding an AutoencoderKL and a sampler's own arithmetic, beside diffusers
start         the command's help and first picture, from nothing
data          what a training step waits for its data
memory        growth over 1,000 steps and 200 pictures, and the estimate, once

Every round starts a fresh process for each worker, one after the other, with the same number of threads. A process
warms up first. A round's number is the median of its calls; the report has the median over rounds with the lowest and
highest, and ratios that are taken within a round. A worker that fails is named in the report; the others go on.

What "equal size" means. The transformers have the same width, depth, heads, feed-forward width and rows of
embeddings, which is how the field names sizes. They do not have the same number of parameters:
transfusion-pytorch lets the time of the noise into every layer through matrices of its own (adaptive layer
norm; 13 of its 21 million parameters here) where the paper adds one vector to each patch, and joins the first
half of its layers to the second (U-Net skips). These work on every token. So one of our peers is a wider model
that has as many parameters as theirs. Both numbers are printed.

What else is not equal. Their feed-forward gate is gelu; ours is silu (the paper's), or relu in a peer of its
own, which is what our models for the CPU use. Their text loss is computed over all positions, ours over those
that predict text. Their step has no moving average of the weights; ours has. They wrap a picture in 5 more
tokens (its size in characters), so their captions are 3 tokens shorter in training; all in all both have 92
positions, of which their model sees 91. Guidance leads them away from a caption of null tokens, us from no
caption. Their `modality_steps=16` are 16 points in time, that is 15 steps: they evaluate the network 30 times
with and 30 times without the caption, we 32 times. This is left as it is, in their favour.

Their two samplers are both measured, `sample` (the one of their README, which reads the caption again at every
evaluation) and `sample_many` (which keeps keys and values, as ours does). Ratios are taken to the faster one.

transfusion-pytorch, diffusers and mlx-lm run in the Python that --peer-python names, so they are no
dependencies of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import document
import goals
from report import THEIRS, ratios, table
from workload import Workload

HERE = Path(__file__).resolve().parent
BASE = Workload()
OURS = {
    goals.OURS: BASE,
    "mlx-transfusion, as many parameters": dataclasses.replace(BASE, width=448, heads=7, feed_forward=1138),
}
"""Our peers; the first one is held to the goals."""
SECTIONS = ("transfusion", "matmul", "student", "prefix", "text", "diffusers", "start", "data", "memory")
ONCE = ("text", "memory")
"""What takes long is measured in the first round alone; text_decode.py takes turns of its own."""
LIMIT = 300
"""Seconds after which a worker counts as failed."""
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS")  # fmt: skip
BUSY = 0.5
"""Load of the machine, averaged over a minute, above which a run shows that the parts work and no more."""
NO_VERDICT = "The machine was busy with something else, so these numbers do not count."


def main() -> int:
    """Measure, print the report and write it down; returns the exit code."""
    options = parse()
    load = os.getloadavg()[0]
    say(f"{options.rounds} rounds with {options.threads} threads; load of this machine before: {load:.2f}")
    if load > BUSY:
        say(f"warning: {NO_VERDICT}")
    rounds: list[dict[str, dict[str, Any]]] = []
    facts = machine(options.threads) | {"rounds": options.rounds, "load before": round(load, 2)}
    busy = NO_VERDICT if load > BUSY else ""
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        rounds.append({})
        for worker, result in one_round(options, number):
            rounds[-1][worker] = result
            # After each worker, so that a run that is cut off leaves what it has.
            if options.document is not None:
                write_text(options.document, document.document(rounds, facts, busy))
            if options.output is not None:
                write(options.output, {"machine": facts, "ratios": plain(rounds), "rounds": rounds})
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if complete(rounds):
        print(f"\n{table(only_peers(rounds))}")
    print(f"\n{goals.table(rounds, verdict=not busy)}")
    print("\n".join([*document.failures(rounds), busy]))
    return 0


def complete(rounds: list[dict[str, dict[str, Any]]]) -> bool:
    """Whether every round has the peers that the table of transfusion-pytorch compares."""
    peers = (*OURS, THEIRS)
    return all(peer in one and "error" not in one[peer] for one in rounds for peer in peers)


def only_peers(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Of each round, what the table of transfusion-pytorch compares."""
    return [{peer: one[peer] for peer in (goals.OURS, THEIRS, *list(OURS)[1:])} for one in rounds]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each peer")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=" ".join(SECTIONS)
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all timings")
    parser.add_argument("--document", type=Path, metavar="FILE.md", help="the page docs/benchmarks.md")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, for text")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="that has the other projects"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads: use 1 or more")
    return options


def one_round(options: argparse.Namespace, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The workers of the chosen sections, and what each printed."""
    for section in options.only:
        if number and section in ONCE:
            continue
        if section == "text":
            yield section, text(options)
            continue
        for worker, command in commands(section, options).items():
            say(f"  {worker}")
            yield worker, attempt(command, options.threads)


def commands(section: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """Worker -> how it is started; peers that are compared stand next to each other."""
    python, threads = sys.executable, str(options.threads)
    if section == "transfusion":
        mine = {peer: [python, str(HERE / "ours.py"), of.to_json()] for peer, of in OURS.items()}
        first, *rest = mine.items()
        torch = [python, str(HERE / "torch_path.py"), BASE.to_json(), threads]
        return {
            **dict([first]),
            THEIRS: [options.peer_python, str(HERE / "theirs.py"), BASE.to_json(), threads],
            **dict(rest),
            goals.EAGER: [*torch, "eager"],
            goals.COMPILED: [*torch, "compiled"],
        }
    if section == "diffusers":
        script = str(HERE / "diffusers_peer.py")
        return {
            "AutoencoderKL": [python, script, "ours", threads],
            "diffusers": [options.peer_python, script, "diffusers", threads],
        }
    return {section: [python, str(HERE / "parts.py"), section]}


def attempt(command: list[str], threads: int) -> dict[str, Any]:
    """As `run`; a worker that fails gives {"error": its last line}."""
    try:
        return run(command, threads)
    except SystemExit as stopped:
        say(f"  {stopped}")
        return {"error": str(stopped).removeprefix("error: ")}


def text(options: argparse.Namespace) -> dict[str, Any]:
    """The ratios of text_decode.py by kind of weights: ours by mlx-lm's, and 8 texts by one."""
    if options.gguf is None:
        return {"error": "text decode needs --gguf"}
    say("  text")
    command = [
        sys.executable, str(HERE / "text_decode.py"), str(options.gguf), "--json", "--rounds", "2", "--tokens", "48",
        "--prompt-tokens", "128", "--peer-python", options.peer_python,
    ]  # fmt: skip
    return text_ratios(attempt(command, options.threads))


def text_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Of what text_decode.py prints: for each kind of weights {measurement: [ratio], ..., "gain of 8": [ratio]}."""
    if "error" in found:
        return found
    return {
        kind: {name: [m["ratio"]] for name, m in r["measures"].items()} | {"gain of 8": [r["batch gain"]]}
        for kind, r in found.items()
    }


def run(command: list[str], threads: int) -> dict[str, Any]:
    """The JSON object that a worker prints; exits with its last line of complaint when it fails."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    if command[0] == sys.executable:  # this tree, whether or not it is installed
        path = [str(HERE.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        sys.exit(f"error: {Path(command[1]).name} took more than {LIMIT} s")
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}")
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"{command[1]} failed"])[-1]
        sys.exit(f"error: {complaint.removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def plain(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Mapping[str, float]]]:
    """The ratios to transfusion-pytorch as JSON, where it was measured."""
    found = ratios(only_peers(rounds)) if complete(rounds) else {}
    return {kind: {peer: dataclasses.asdict(s) for peer, s in of.items()} for kind, of in found.items()}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
