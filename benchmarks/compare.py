"""Speed beside transfusion-pytorch 0.20.0, side by side in one run: `python benchmarks/compare.py`.

Two measurements, on the CPU in float32:

training step    forward, backward and AdamW on 16 pairs of caption (24 tokens) and picture (64 patches of 4x4
                 pixels in colour), including the packing of the sequences and the drawing of noise, and
                 without the reading of files
guided picture   a picture of 64 patches from a caption of 24 tokens: prompt, 16 midpoint steps at guidance 3,
                 pixels

Every round starts a fresh process for each peer, one after the other (A B A B), with the same number of
threads. A process warms up first. A round's number is the median of its calls; the report has the median over
rounds with the lowest and highest, and ratios that are taken within a round.

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

The peer runs in the Python that --peer-python names, so it is no dependency of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import THEIRS, ratios, table, verdicts
from workload import Workload

HERE = Path(__file__).resolve().parent
BASE = Workload()
OURS = {
    "mlx-transfusion": BASE,
    "mlx-transfusion, relu gate": dataclasses.replace(BASE, gate="relu"),
    "mlx-transfusion, as many parameters": dataclasses.replace(BASE, width=448, heads=7, feed_forward=1138),
}
"""Our peers; the first one is held to the goals."""
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
    rounds = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        rounds.append(one_round(options))
    facts = machine(options.threads) | {"load before": round(load, 2)}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    for peer, result in rounds[0].items():
        print(f"{peer}: {json.dumps({k: result[k] for k in ('versions', 'positions', 'passes')})}")
    print(f"\n{table(rounds)}\n\n{verdicts(rounds) if load <= BUSY else NO_VERDICT}")
    if options.output is not None:
        write(options.output, {"machine": facts, "ratios": plain(rounds), "rounds": rounds})
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each peer")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all timings")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="that has transfusion-pytorch"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads: use 1 or more")
    return options


def one_round(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each peer's worker printed; the peer comes after our first, so the two stand next to each other."""
    mine = [
        (peer, [sys.executable, str(HERE / "ours.py"), workload.to_json()]) for peer, workload in OURS.items()
    ]
    script = str(HERE / "theirs.py")
    theirs = (THEIRS, [options.peer_python, script, BASE.to_json(), str(options.threads)])
    return {peer: run(command, options.threads) for peer, command in (mine[0], theirs, *mine[1:])}


def run(command: list[str], threads: int) -> dict[str, Any]:
    """The JSON object that a worker prints; exits with its last line of complaint when it fails."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    if command[0] == sys.executable:  # this tree, whether or not it is installed
        path = [str(HERE.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}")
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"{command[1]} failed"])[-1]
        sys.exit(f"error: {complaint.removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(done.stdout)
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
    """The ratios as JSON."""
    found = ratios(rounds)
    return {kind: {peer: dataclasses.asdict(s) for peer, s in of.items()} for kind, of in found.items()}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
