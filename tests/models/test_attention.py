"""The attention seam against a dense reference computed from q, k, v."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.models import cpu, product
from mlx_blockskip.models.attention import IMAGE_TO_TEXT, attention
from support.compare import relative_error, same_bits
from support.metal import route_as_on_metal

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


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["plain", "masked", "bias"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_on_metal_it_computes_the_same_bits_whether_it_is_differentiated_or_not(head_dim, kind, dtype, monkeypatch):
    shape = (2, 3, 17, head_dim)
    q, k, v, upstream = (mx.array(philox.normal(1, i, shape=shape)).astype(dtype) for i in range(4))
    given = {
        "plain": {},
        "masked": {"text_length": TEXT, "mask": IMAGE_TO_TEXT},
        "bias": {"bias": mx.array(philox.normal(1, 9, shape=(2, 1, 1, 17)) * 3).astype(dtype)},
    }[kind]

    def attend(*qkv):
        return attention(*qkv, scale=head_dim**-0.5, query_chunk=6, **given)

    def run():
        alone = attend(q, k, v)
        (inside,), pulled = mx.vjp(lambda *qkv: [attend(*qkv)], [q, k, v], [upstream])
        return alone, inside, pulled

    plain = run()
    taken = route_as_on_metal(monkeypatch)
    alone, inside, pulled = run()
    assert set(taken) == ({shape} if cpu.in_use() else set()), "without chunks of queries"
    bound = 1e-5 if dtype == mx.float32 else 2**-6
    assert same_bits(alone, inside)
    assert relative_error(alone.astype(mx.float32), plain[0].astype(mx.float32)) <= bound
    for ours, expected in zip(pulled, plain[2], strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.astype(mx.float32), expected.astype(mx.float32)) <= bound


def test_what_the_fused_kernel_does_not_take_has_its_scores_written_out(monkeypatch):
    taken = route_as_on_metal(monkeypatch)
    for length, head_dim in ((17, 32), (17, 112), (17, 256), (8, 64)):
        x = mx.array(philox.normal(2, shape=(1, 2, length, head_dim)))
        attention(x, x, x, scale=0.1)
    attention(*(mx.zeros((1, 2, 17, d)) for d in (64, 64, 32)), scale=0.1)
    assert not taken


def test_scores_written_out_are_mlx_attention(monkeypatch):
    """What Metal computes where the fused kernel does not fit, here on the CPU."""
    bias = mx.array(philox.normal(0, 9, shape=(2, 1, 1, 17)))
    monkeypatch.setattr(cpu, "in_use", lambda: False)
    for mask in (None, bias):
        expected = mx.fast.scaled_dot_product_attention(Q, K, V, scale=0.3, mask=mask)
        assert relative_error(product.attention(Q, K, V, 0.3, mask), expected) <= 1e-6
