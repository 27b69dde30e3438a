"""The attention seam against a dense reference computed from q, k, v."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.models.attention import IMAGE_TO_TEXT, attention
from support.compare import relative_error, same_bits

TEXT = 5
Q, K, V = (mx.array(philox.normal(0, i, shape=(2, 3, 17, 8))) for i in range(3))


def dense(bias=None, mask=None):
    q, k, v = (np.array(x, np.float64) for x in (Q, K, V))
    scores = q @ k.transpose(0, 1, 3, 2) * 0.3
    if bias is not None:
        scores = scores + bias
    if mask:
        scores[:, :, TEXT:, :TEXT] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 6, 16, 17, 40])
@pytest.mark.parametrize("mask", [None, IMAGE_TO_TEXT])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_dense_reference_in_chunks_of_every_size(chunk, mask, with_bias):
    bias = philox.normal(0, 9, shape=(1, 3, 17, 17)) if with_bias else None
    ours = attention(
        Q,
        K,
        V,
        scale=0.3,
        bias=None if bias is None else mx.array(bias),
        text_length=TEXT,
        mask=mask,
        query_chunk=chunk,
    )
    assert relative_error(ours, dense(bias, mask)) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
@pytest.mark.parametrize("mask", [None, IMAGE_TO_TEXT])
def test_gradients_in_chunks_equal_those_of_the_whole(chunk, mask):
    upstream = mx.array(philox.normal(0, 7, shape=Q.shape))

    def pulled(query_chunk):
        def run(*qkv):
            return [attention(*qkv, scale=0.3, text_length=TEXT, mask=mask, query_chunk=query_chunk)]

        return mx.vjp(run, [Q, K, V], [upstream])[1]

    for ours, whole in zip(pulled(chunk), pulled(17), strict=True):
        assert relative_error(ours, whole) <= 1e-5


def test_the_way_back_holds_the_scores_of_one_chunk():
    """Many queries and few channels, so that scores are nearly all there is."""
    x = mx.array(philox.normal(0, shape=(1, 1, 2048, 4)))
    scores = 2048 * 2048 * 4
    peaks = {}
    mx.eval(x)
    for chunk in (2048, 64):
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        mx.eval(mx.grad(lambda q, chunk=chunk: mx.square(attention(q, x, x, scale=1.0, query_chunk=chunk)).sum())(x))
        peaks[chunk] = mx.get_peak_memory() - start
    assert peaks[2048] >= 2 * scores
    assert peaks[64] <= scores / 2


def test_text_queries_are_not_touched_by_the_mask():
    plain = attention(Q, K, V, scale=0.3, text_length=TEXT)
    masked = attention(Q, K, V, scale=0.3, text_length=TEXT, mask=IMAGE_TO_TEXT)
    assert relative_error(masked[:, :, :TEXT], plain[:, :, :TEXT]) <= 1e-6
    assert relative_error(masked[:, :, TEXT:], plain[:, :, TEXT:]) > 1e-2
    assert same_bits(attention(Q, K, V, scale=0.3, mask=IMAGE_TO_TEXT), plain), "without text there is nothing to mask"


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="causal"):
        attention(Q, K, V, scale=1.0, mask="causal")
