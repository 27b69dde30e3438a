import mlx_blockskip  # noqa: F401  (preloads OpenBLAS before anything imports mlx.core)
