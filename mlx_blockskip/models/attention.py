"""The one attention seam: scaled dot product, rotary positions, the image-to-text mask, exact query chunks."""

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from mlx_blockskip.models import kernels, product

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
Rows = Callable[[mx.array, mx.array, mx.array, int], mx.array]
"""`(queries of some rows, keys, values, first row) -> attended`."""

IMAGE_TO_TEXT = "image_to_text"
"""The mask of DiT-BlockSkip's block selection (section 3.3): image queries do not see text keys."""

SCORE_BYTES = 64 << 20
"""Scores of one query chunk, in float32. A constant, so that chunks follow from shapes alone."""


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    bias: mx.array | None = None,
    text_length: int = 0,
    mask: str | None = None,
    query_chunk: int | None = None,
) -> mx.array:
    """softmax(scale q k^T + bias) v: by Metal's fused kernel where it fits, else in chunks of query rows, each exact.

    q: (B, H, Lq, d); k, v: (B, H, Lk, d); bias broadcasts to (B, H, Lq, Lk) and gets no gradient. Where `mask` is
    IMAGE_TO_TEXT, the first `text_length` positions of queries and keys are text, and -inf is added at (image query,
    text key). query_chunk: rows a chunk; by default as many as keep the scores under SCORE_BYTES. On the way back there
    are scores in both cases, so both go by these rows.

    Raises ValueError for a mask that is not known.
    """
    if mask not in (None, IMAGE_TO_TEXT):
        raise ValueError(f"attention mask {mask!r} is not known; use None or {IMAGE_TO_TEXT!r}")
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    chunk = query_chunk or max(1, SCORE_BYTES // (4 * batch * heads * keys))
    if mask == IMAGE_TO_TEXT and text_length:
        masked = image_to_text_bias(length, keys, text_length, q.dtype)
        bias = masked if bias is None else bias + masked

    def rows(queries: mx.array, keys: mx.array, values: mx.array, start: int) -> mx.array:
        stop = start + queries.shape[2]
        part = None if bias is None else bias[..., start:stop, :] if bias.shape[-2] > 1 else bias
        return product.attention(queries, keys, values, scale, part)

    if product.is_fused(q, v):
        return _differentiable(lambda q, k, v: product.fused_attention(q, k, v, scale, bias), rows, chunk)(q, k, v)
    if chunk >= length:
        return rows(q, k, v, 0)
    return _differentiable(_in_chunks(rows, chunk), rows, chunk)(q, k, v)


def _in_chunks(rows: Rows, chunk: int) -> Attend:
    """Attention by query rows, each chunk after the one before: MLX evaluates branches of a graph side by side."""

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        done: list[mx.array] = []
        for s in range(0, q.shape[2], chunk):
            queries = q[:, :, s : s + chunk]
            if done:
                queries = mx.depends([queries], done[-1:])[0]
            done.append(rows(queries, k, v, s))
        return mx.concatenate(done, axis=2)

    return attend


def _differentiable(forward: Attend, rows: Rows, chunk: int) -> Attend:
    """`forward`, whose gradient goes by query rows, one chunk's scores at a time, made again from q, k and v.

    Whether it is being differentiated or not, it computes the same: autograd sees only the gradient that is given here.
    """

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return forward(q, k, v)

    @attend.vjp
    def pull_back(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        q, k, v = primals
        dq: list[mx.array] = []
        sums: list[mx.array] = []
        for s in range(0, q.shape[2], chunk):
            queries, upstream = q[:, :, s : s + chunk], cotangent[:, :, s : s + chunk]
            if dq:
                ready = mx.depends([queries, upstream], [dq[-1], *sums])
                queries, upstream = ready[0], ready[1]

            def these(*qkv: mx.array, first: int = s) -> list[mx.array]:
                return [rows(qkv[0], qkv[1], qkv[2], first)]

            _, (own, *shared) = mx.vjp(these, [queries, k, v], [upstream])
            dq.append(own)
            sums = [a + b for a, b in zip(sums, shared, strict=True)] if sums else shared
        return mx.concatenate(dq, axis=2), sums[0], sums[1]

    return cast(Attend, attend)


def image_to_text_bias(queries: int, keys: int, text_length: int, dtype: mx.Dtype) -> mx.array:
    """(Lq, Lk), -inf where the query is an image token and the key a text token, else 0."""
    image_query = mx.arange(queries)[:, None] >= text_length
    text_key = mx.arange(keys)[None, :] < text_length
    return mx.where(image_query & text_key, mx.array(-float("inf"), dtype), mx.array(0, dtype))


def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate neighbouring pairs of the last axis, in float32.

    x: (B, H, L, d); cos, sin: (L, d / 2). Source: diffusers `apply_rotary_emb` with use_real_unbind_dim=-1. On Metal it
    is one kernel.
    """
    if kernels.in_use():
        return kernels.rope(x, cos, sin)
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
