"""Inputs of shards: a tar of captioned pictures and files of text, and the folder that is built from them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from tiny_training import MODEL, OPTIMIZER, top, write_run

from mlx_transfusion.shards.build import build, in_processes
from mlx_transfusion.shards.recipe import make_recipe
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import load_train_config

SOURCES = """
[[data.train]]
shards = "pairs"

[[data.train]]
shards = "text"
"""
TOML = top(batch_size=4) + MODEL + SOURCES + OPTIMIZER


def write_inputs(folder: Path, tokenizer: Tokenizer) -> Path:
    """Two tars of 8 pictures each, text-0.jsonl.gz, text-1.txt, and `shards.toml`, whose path is returned."""
    write_run(folder, tokenizer)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for i in range(2):
        write_tar(folder / f"pairs-{i}.tar", folder / "pictures", rows[8 * i : 8 * i + 8], as_json=bool(i))
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    lines = "".join(json.dumps({"text": f"{text} {text} {text}"}) + "\n" for text in texts)
    (folder / "text-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "text-1.txt").write_text("\n".join(texts))
    toml = folder / "shards.toml"
    toml.write_text(TOML)
    return toml


def write_tar(file: Path, pictures: Path, rows: list[dict[str, str]], as_json: bool = False) -> Path:
    """A tar as webdataset writes it: 00/NAME.png and 00/NAME.txt, or NAME.json."""
    with tarfile.open(file, "w") as tar:
        for row in rows:
            key = row["image"].removesuffix(".png")
            caption = json.dumps({"caption": row["text"]}) if as_json else row["text"]
            members = {
                "png": (pictures / row["image"]).read_bytes(),
                "json" if as_json else "txt": caption.encode(),
            }
            for kind, data in members.items():
                member = tarfile.TarInfo(f"00/{key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file


def build_both(toml: Path) -> None:
    """The folders `pairs` and `text` beside the TOML."""
    recipe = make_recipe(load_train_config(toml))
    for name, inputs in (
        ("pairs", ["pairs-0.tar", "pairs-1.tar"]),
        ("text", ["text-0.jsonl.gz", "text-1.txt"]),
    ):
        build(recipe, toml.parent / name, [toml.parent / i for i in inputs], in_processes(1))
