"""Personalise large diffusion transformers on a Mac, in the memory of a small laptop (DiT-BlockSkip on MLX).

from mlx_blockskip import convert, select, train, generate, evaluate, estimate, doctor
from mlx_blockskip import export, fuse, verify, upload, cache, load
"""

from typing import TYPE_CHECKING, Any

from mlx_blockskip.engine.environment import prepare

if TYPE_CHECKING:
    from mlx_blockskip.api import (
        cache,
        convert,
        doctor,
        estimate,
        evaluate,
        export,
        fuse,
        generate,
        load,
        select,
        train,
        upload,
        verify,
    )

__all__ = [
    "cache", "convert", "doctor", "estimate", "evaluate", "export", "fuse", "generate", "load",
    "select", "train", "upload", "verify",
]  # fmt: skip
__version__ = "0.1.0"

prepare()


def __getattr__(name: str) -> Any:
    """The API is imported when it is first used: `mlx-blockskip --help` needs none of it."""
    if name in __all__:
        from mlx_blockskip import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
