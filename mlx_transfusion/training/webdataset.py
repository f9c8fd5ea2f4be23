"""Tars of captioned pictures, as webdataset and img2dataset write them: members of one sample share a key.

A member's key is its name up to the first dot of its last part: `00/17.jpg`, `00/17.txt` and `00/17.json` are sample
`00/17`. The members of a sample follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from mlx_transfusion.training.image_store import ImageTar

PICTURES = {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
"""Endings of the members that are pictures."""
CAPTIONS = ("text", "caption")
"""Keys of a .json member that may hold the caption, the first that is there."""


def samples(tar: ImageTar) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of a tar in their order, numbered from 1, as rows: {"image": member, "text": caption, "key": key}.

    The caption is the .txt member, or else stands in the .json member. What a sample lacks is missing in its row.
    Raises UserError for a tar that is cut off.
    """
    for number, (key, members) in enumerate(groupby(tar.names, _key), start=1):
        row: dict[str, Any] = {"key": key}
        kinds = {name[len(key) + 1 :].lower(): name for name in members}
        if picture := next((name for kind, name in kinds.items() if kind in PICTURES), None):
            row["image"] = picture
        if (caption := _caption(tar, kinds)) is not None:
            row["text"] = caption
        yield number, row


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _caption(tar: ImageTar, kinds: dict[str, str]) -> Any:
    if "txt" in kinds:
        return tar.read(kinds["txt"]).decode("utf-8", "replace").strip()
    try:
        about = json.loads(tar.read(kinds["json"])) if "json" in kinds else None
    except (ValueError, RecursionError):
        return None
    return next((about[k] for k in CAPTIONS if k in about), None) if isinstance(about, dict) else None
