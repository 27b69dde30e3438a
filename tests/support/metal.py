"""Stand-ins for what only Metal has, so that how it is used is tested on any device."""

import mlx.core as mx
import pytest

from mlx_blockskip.models import cpu, product

KEYS = 7
"""Keys that the stand-in takes at a time."""


def flash(q, k, v, scale, mask):
    """Attention as a fused kernel does it: a running maximum and sum over parts of the keys, in float32.

    It rounds otherwise than scores written out do, and like the kernel it has no gradient.
    """
    wide = mx.float32
    mask = None if mask is None else mx.broadcast_to(mask, (*q.shape[:3], k.shape[2])).astype(wide)
    top = mx.full((*q.shape[:3], 1), -1e30, wide)
    total, out = mx.zeros(top.shape, wide), mx.zeros((*q.shape[:3], v.shape[-1]), wide)
    for start in range(0, k.shape[2], KEYS):
        keys, values = (x[:, :, start : start + KEYS].astype(wide) for x in (k, v))
        scores = scale * (q.astype(wide) @ keys.swapaxes(-1, -2))
        scores = scores if mask is None else scores + mask[..., start : start + KEYS]
        now = mx.maximum(top, scores.max(axis=-1, keepdims=True))
        shares, shrink = mx.exp(scores - now), mx.exp(top - now)
        total, out, top = total * shrink + shares.sum(axis=-1, keepdims=True), out * shrink + shares @ values, now
    return mx.stop_gradient((out / total).astype(q.dtype))


def route_as_on_metal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Attention goes the way it goes on Metal; returns the shapes of queries that the stand-in takes."""
    if not cpu.in_use():
        return []  # here it is the kernel itself
    taken: list[tuple[int, ...]] = []

    def fused(q, k, v, scale, mask):
        taken.append(q.shape)
        return flash(q, k, v, scale, mask)

    monkeypatch.setattr(product, "is_fused", product.fits_fused)
    monkeypatch.setattr(product, "fused_attention", fused)
    return taken
