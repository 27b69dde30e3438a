"""How near two results are."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import files


def relative_error(ours, reference) -> float:
    """Largest absolute error over the reference's largest magnitude."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Equal to the last bit."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(mx.array_equal(a, b))


def factors(directory):
    tensors = files.load_lazily(directory / "adapters.safetensors")
    mx.eval(tensors)
    return tensors


def assert_same_adapter(a, b):
    first, second = factors(a), factors(b)
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
