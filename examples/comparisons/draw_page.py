"""Tables in a page of text: what stands between a table's two markers is written anew, the text around it stays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mlx_transfusion.errors import UserError


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Write each table, by name, between `<!-- table NAME -->` and `<!-- end of NAME -->`.

    Raises UserError, with nothing written, when the page cannot be read or has not exactly one such place.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be read: {error.strerror}") from error
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end of {name} -->\n"
        above, _, rest = text.partition(begin)
        _, found, below = rest.partition(end)
        if not found or begin in below:
            places = f'"{begin.strip()}" and below it "{end.strip()}", once'
            raise UserError(f"{page}: has no place for table {name}: expected the lines {places}")
        text = f"{above}{begin}{table.strip()}\n{end}{below}"
    temporary = page.with_name(f".{page.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, page)
