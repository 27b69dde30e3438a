"""Give MLX's Linux CPU backend a fast BLAS.

The Linux wheel of MLX is linked to the reference BLAS. When OpenBLAS is opened with global symbols before
`mlx.core` is first imported, MLX's float32 products bind to it instead (about fifty times faster).
"""

import ctypes
import sys

LIBRARY = "libopenblas.so.0"


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
