"""How near two results are."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import files


def relative_error(ours, reference) -> float:
    """Largest absolute error over the reference's largest magnitude."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


NETWORK, PIPELINE, LEVELS = 1e-4, 1e-3, 2.0
"""Largest error relative to the reference's largest magnitude; for images, levels of 255."""

worst: dict[str, tuple[float, float, int]] = {}
"""What was held against a reference so far: worst error, bound and number of comparisons, printed at the end."""


def assert_parity(network: str, ours, reference, bound: float = NETWORK) -> None:
    """Equal to what the reference implementation computes from the same weights, within the bound."""
    record(network, relative_error(ours, reference), bound)


def assert_same_image(pipeline: str, ours, reference) -> None:
    """Images in levels of 255 that differ by rounding only."""
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64))
    record(pipeline, float(difference.max()), LEVELS)


def record(name: str, error: float, bound: float) -> None:
    """Keep the error for the table, and assert the bound."""
    gather(name, error, bound, 1)
    assert error <= bound, f"{name}: {error:.2e} is above {bound:g}"


def gather(name: str, error: float, bound: float, count: int) -> None:
    """Add `count` comparisons, the worst of them `error`, to the table."""
    before, _, seen = worst.get(name, (0.0, bound, 0))
    worst[name] = (max(before, error), bound, seen + count)


def parity_table() -> str:
    """Markdown: the worst error of each network and pipeline against its reference."""
    rows = [f"| {name} | {n} | {error:.1e} | {bound:g} |" for name, (error, bound, n) in sorted(worst.items())]
    return "\n".join(
        ["| against diffusers and transformers | compared | worst error | bound |", "|---|---|---|---|", *rows]
    )


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
