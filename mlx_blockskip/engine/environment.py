"""What has to be in place before MLX is first used: two of its settings, and on Linux a fast BLAS.

MLX reads its settings from environment variables. A value that the user has set himself stays.

- `MLX_CONV_WINOGRAD_WORKING_SET=1`: on Metal a 3 x 3 convolution of many channels otherwise goes by Winograd, whose
  transforms are kept in the type of the input: in bfloat16 that loses several bits more than rounding does. With no
  room for these transforms MLX takes its implicit product. It is read at each convolution.
- `MLX_ENABLE_TF32=0`: on an M5 or later a product of float32 otherwise keeps 10 bits of each factor. It is read once,
  at the first product.

The Linux wheel of MLX is linked to the reference BLAS. When OpenBLAS is opened with global symbols before `mlx.core` is
first imported, MLX's float32 products bind to it instead (about fifty times faster).
"""

import ctypes
import os
import sys
from typing import NamedTuple

LIBRARY = "libopenblas.so.0"

WANTED = {"MLX_CONV_WINOGRAD_WORKING_SET": "1", "MLX_ENABLE_TF32": "0"}

READ_ONCE = ("MLX_ENABLE_TF32",)
"""Settings that MLX reads at their first use and keeps."""


class Setting(NamedTuple):
    """value: what the environment says, which is not `wanted` where the user has set it. late: set here when MLX was in
    use already, so that it may go by its own default.
    """

    value: str
    wanted: str
    late: bool


_late: set[str] = set()


def prepare() -> None:
    """Set what the user has not, and open OpenBLAS. Called once, when the package is imported."""
    used = _mlx_is_in_use()
    for name, value in WANTED.items():
        if name not in os.environ:
            os.environ[name] = value
            if used and name in READ_ONCE:
                _late.add(name)
    preload()


def state() -> dict[str, Setting]:
    """MLX's settings by the names of their variables."""
    return {name: Setting(os.environ.get(name, ""), wanted, name in _late) for name, wanted in WANTED.items()}


def preload() -> bool:
    """Open OpenBLAS on Linux where it is installed; do nothing elsewhere, or once MLX is there, which is too late. True
    where it is in place.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _mlx_is_in_use() -> bool:
    """Whether MLX has held an array. Importing it reads no setting."""
    mlx = sys.modules.get("mlx.core")
    return mlx is not None and mlx.get_peak_memory() + mlx.get_cache_memory() > 0
