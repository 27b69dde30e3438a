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
PLAIN = (mx.uint8, mx.int32, mx.uint32, mx.float32)  # Python sees their bytes as they lie


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a safetensors dtype name."""
    return DTYPES[name][1]


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
