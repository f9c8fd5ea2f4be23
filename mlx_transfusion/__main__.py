"""`python -m mlx_transfusion`: the command line."""

from mlx_transfusion.cli import main

main()
