import mlx.core as mx
import pytest

from mlx_blockskip.engine import limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import cpu, product
from mlx_blockskip.models.layers import linear

WIDTH, OUT = 192, 320


@pytest.fixture
def inputs():
    a, b, c = mx.random.split(mx.random.key(0), 3)
    return (
        mx.random.normal((2, 5, WIDTH), key=a),
        mx.random.normal((OUT, WIDTH), key=b),
        mx.random.normal((OUT,), key=c),
    )


def close(found, expected, bound):
    assert found.shape == expected.shape
    scale = mx.max(mx.abs(expected)).item()
    assert mx.max(mx.abs(found.astype(mx.float32) - expected)).item() <= bound * scale


@pytest.mark.parametrize("parts", [False, True])
def test_bfloat16_products_are_summed_in_float32_both_ways(inputs, parts, monkeypatch):
    if parts:  # 7 rows or columns of the weight and 2 tokens at a time
        monkeypatch.setattr(cpu, "WEIGHT_BYTES", 4 * WIDTH * 7)
        monkeypatch.setattr(cpu, "TOKEN_BYTES", 4 * WIDTH * 2)
    x, weight, bias = (array.astype(mx.bfloat16) for array in inputs)
    y = product.matmul(x, weight, bias)
    exact = x.astype(mx.float32) @ weight.astype(mx.float32).T
    assert y.dtype == mx.bfloat16
    close(y, exact + bias.astype(mx.float32), 2**-7)
    (_,), (dx,) = mx.vjp(lambda x: product.matmul(x, weight, bias), [x], [y])
    close(dx, y.astype(mx.float32) @ weight.astype(mx.float32), 2**-8)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (6, 64), (8, 32)])
def test_quantized_products_are_those_of_the_weight_it_stands_for(inputs, bits, group, parts, monkeypatch):
    if parts:
        monkeypatch.setattr(cpu, "WEIGHT_BYTES", 4 * OUT * group)
        monkeypatch.setattr(cpu, "TOKEN_BYTES", 4 * WIDTH * 2)
    x, weight, bias = inputs
    quantized = mx.quantize(weight, group_size=group, bits=bits)
    whole = mx.dequantize(*quantized, group_size=group, bits=bits)
    y = product.quantized_matmul(x, *quantized, bias)
    close(y, x @ whole.T + bias, 1e-6)
    (_,), (dx,) = mx.vjp(lambda x: product.quantized_matmul(x, *quantized, bias), [x], [y])
    close(dx, y @ whole, 1e-6)


def test_it_is_what_mlx_computes(inputs):
    x, weight, _ = inputs
    quantized = mx.quantize(weight, group_size=64, bits=4)
    own = mx.quantized_matmul(x, *quantized, transpose=True, group_size=64, bits=4)
    close(product.quantized_matmul(x, *quantized), own, 1e-6)
    half = x.astype(mx.bfloat16), weight.astype(mx.bfloat16)
    close(product.matmul(*half), (half[0] @ half[1].T).astype(mx.float32), 2**-7)


def test_a_part_of_the_weight_at_a_time_is_in_memory(monkeypatch):
    weight = mx.zeros((4096, 1024), mx.bfloat16)
    x = mx.zeros((1, 8, 1024), mx.bfloat16)
    monkeypatch.setattr(cpu, "WEIGHT_BYTES", 1 << 20)
    mx.eval(weight, x)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with limits.tight():
        mx.eval(linear({"l.weight": weight}, "l", x))
    assert mx.get_peak_memory() - before < 4 << 20  # the whole weight in float32 would take 16 MiB


def test_attention_in_bfloat16_is_that_of_float32_rounded():
    q, k, v = (mx.random.normal((1, 2, 6, 8), key=mx.random.key(i)).astype(mx.bfloat16) for i in range(3))
    found = product.attention(q, k, v, 0.3, None)
    exact = mx.fast.scaled_dot_product_attention(*(a.astype(mx.float32) for a in (q, k, v)), scale=0.3)
    assert found.dtype == mx.bfloat16
    close(found, exact, 2**-8)


@pytest.mark.parametrize("way", [None, "packed", "whole"])
def test_both_gradients_through_a_quantized_weight_are_those_of_the_weight_it_stands_for(inputs, way, monkeypatch):
    x, weight, bias = inputs
    quantized = mx.quantize(weight, group_size=64, bits=4)
    whole = mx.dequantize(*quantized, group_size=64, bits=4)
    monkeypatch.setattr(cpu, "in_use", lambda: False)  # what Metal computes, on the CPU
    if way is None:
        monkeypatch.delenv(product.GRADIENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(product.GRADIENT_VARIABLE, way)
    used = []
    monkeypatch.setitem(product.GRADIENTS, "whole", lambda *a: (used.append(True), product.through_whole(*a))[1])
    product.gradient_through.cache_clear()
    try:
        (y,), (dx,) = mx.vjp(lambda x: product.quantized_matmul(x, *quantized, bias), [x], [mx.ones((2, 5, OUT))])
    finally:
        product.gradient_through.cache_clear()
    close(y, x @ whole.T + bias, 1e-5)
    close(dx, mx.ones((2, 5, OUT)) @ whole, 1e-5)
    close(product.through_packed(y, quantized, 64, 4), product.through_whole(y, quantized, 64, 4), 1e-5)
    assert bool(used) == (way == "whole")


def test_a_way_of_the_gradient_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setenv(product.GRADIENT_VARIABLE, "dense")
    with pytest.raises(UserError, match="packed or whole"):
        product.gradient_through.__wrapped__()
