"""`python -m mlx_transfusion.convert`: the verb `mlx-transfusion convert`."""

from __future__ import annotations

import sys

from mlx_transfusion.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
