"""Dtypes by safetensors' names, and arrays as the bytes that a file holds."""

import mlx.core as mx
import numpy as np

DTYPES: dict[str, tuple[int, mx.Dtype]] = {
    "BOOL": (1, mx.bool_),
    "U8": (1, mx.uint8),
    "I8": (1, mx.int8),
    "U16": (2, mx.uint16),
    "I16": (2, mx.int16),
    "F16": (2, mx.float16),
    "BF16": (2, mx.bfloat16),
    "U32": (4, mx.uint32),
    "I32": (4, mx.int32),
    "F32": (4, mx.float32),
    "U64": (8, mx.uint64),
    "I64": (8, mx.int64),
}
BITS = {name: 8 * size for name, (size, _) in DTYPES.items()} | {
    **{"F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Of every dtype that safetensors has, also of those that MLX has not."""
PLAIN = (mx.uint8, mx.int32, mx.uint32, mx.float32)  # Python sees their bytes as they lie


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a safetensors dtype name."""
    return DTYPES[name][1]


def nbytes(name: str, count: int) -> int:
    """Bytes that `count` numbers of a safetensors dtype take in a file."""
    return count * BITS[name] // 8


def dtype_name(dtype: mx.Dtype | np.dtype) -> str:
    """The safetensors name of a dtype."""
    if isinstance(dtype, np.dtype):
        dtype = mx.array(np.zeros((), dtype)).dtype
    return next(name for name, (_, known) in DTYPES.items() if known == dtype)


def raw_bytes(array: mx.array | np.ndarray) -> memoryview:
    """The array's bytes in row order, without a copy where it is contiguous."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
    if array.size == 0:
        return memoryview(b"")
    if array.dtype in PLAIN and (view := memoryview(array)).c_contiguous:  # type: ignore[arg-type]
        return view.cast("B")  # nothing is scheduled for it
    array = mx.contiguous(array.reshape(-1)).view(mx.uint8)
    mx.eval(array)
    return memoryview(array).cast("B")  # type: ignore[arg-type]
