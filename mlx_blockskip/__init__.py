"""Personalise large diffusion transformers on a Mac, in the memory of a small laptop (DiT-BlockSkip on MLX)."""

from mlx_blockskip.engine.blas import preload

preload()

__version__ = "0.1.0"
