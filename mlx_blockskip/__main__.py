"""`python -m mlx_blockskip`."""

from mlx_blockskip.cli import main

main()
