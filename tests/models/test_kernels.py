"""Metal's kernels, here by the same bodies compiled as C++, against the chains of operations that they stand for."""

import mlx.core as mx
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.models import kernels
from mlx_blockskip.models.attention import apply_rope
from mlx_blockskip.models.layers import gate_add, gelu_tanh, modulated, silu
from support.compare import relative_error, same_bits
from support.metal import kernels_on_the_cpu


@pytest.fixture
def by_kernels(monkeypatch, tmp_path):
    return lambda: kernels_on_the_cpu(monkeypatch, tmp_path)


def normal(*key, shape, dtype=mx.float32):
    return mx.array(philox.normal(*key, shape=shape)).astype(dtype)


def rope_input(dtype):
    angles = normal(1, 1, shape=(7, 8))
    heads = normal(1, 2, shape=(2, 7, 3, 16), dtype=dtype).transpose(0, 2, 1, 3)
    return heads, lambda x: apply_rope(x, mx.cos(angles), mx.sin(angles))


def gelu_input(dtype):
    return normal(2, 1, shape=(2, 5, 33), dtype=dtype) * 3, gelu_tanh


def silu_input(dtype):
    return normal(2, 1, shape=(2, 5, 33), dtype=dtype) * 3, silu


def like(x, *others):
    return [other.astype(x.dtype) for other in others]


def modulated_input(dtype, batch=2):
    shift, scale = (normal(4, i, shape=(batch, 1, 33), dtype=dtype) for i in range(2))
    return normal(2, 1, shape=(2, 5, 33), dtype=dtype), lambda x: modulated(x, *like(x, shift, scale))


def modulated_alike_input(dtype):
    return modulated_input(dtype, batch=1)


def residual_input(dtype):
    gate, branch = normal(5, shape=(2, 1, 33), dtype=dtype), normal(6, shape=(2, 5, 33), dtype=dtype)
    return normal(2, 1, shape=(2, 5, 33), dtype=dtype), lambda x: gate_add(x, *like(x, gate, branch))


def branch_input(dtype):
    gate, residual = normal(5, shape=(2, 1, 33), dtype=dtype), normal(6, shape=(2, 5, 33), dtype=dtype)
    return normal(2, 1, shape=(2, 5, 33), dtype=dtype), lambda x: gate_add(*like(x, residual, gate), x)


CHAINS = [
    gelu_input, silu_input, rope_input, modulated_input, modulated_alike_input, residual_input, branch_input,
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_kernel_computes_what_its_chain_does_both_ways(chain, dtype, by_kernels):
    x, function = chain(dtype)
    wide = x.astype(mx.float32)
    upstream = normal(3, shape=x.shape, dtype=dtype)
    values, pulled = mx.vjp(function, [wide], [upstream.astype(mx.float32)])
    by_kernels()
    (ours,), (back,) = mx.vjp(function, [x], [upstream])
    bound = 1e-5 if dtype == mx.float32 else 2**-8
    for found, expected in ((ours, values[0]), (back, pulled[0])):
        assert found.dtype == dtype
        assert relative_error(found.astype(mx.float32), expected) <= bound
    assert same_bits(function(x), ours), "alone as in what is differentiated"


def test_what_the_kernels_are_held_against_before_their_first_use(by_kernels):
    by_kernels()
    trials = kernels._trials()
    assert {name.split()[0] for name in trials} == set(kernels.SOURCES)
    assert [name for name, (ours, plain) in trials.items() if not kernels._near(ours, plain)] == []


@pytest.mark.parametrize("name", kernels.SOURCES)
def test_a_kernel_that_says_something_else_is_not_used(name, by_kernels, monkeypatch):
    by_kernels()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.refusal.__wrapped__() is None
    monkeypatch.setitem(kernels.SOURCES, name, kernels.SOURCES[name].replace("float(x[", "1.02f * float(x["))
    by_kernels()
    said = kernels.refusal.__wrapped__()
    assert said.startswith("other values than MLX's own operations")
    assert name in said


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch):
    def broken(name):
        raise RuntimeError("unknown type name 'bfloat17'")

    monkeypatch.setattr(kernels, "_kernel", broken)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert kernels.refusal.__wrapped__() == "they do not run: unknown type name 'bfloat17'"


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert "MLX_BLOCKSKIP_KERNELS is 0" in kernels.refusal.__wrapped__()
