"""A sample of many like passes says what all of them take."""

import mlx.core as mx
import pytest

from mlx_blockskip.engine import philox, planner
from mlx_blockskip.engine.sampled import passes, sampled
from mlx_blockskip.models import cpu


def test_a_pass_is_made_again_where_more_memory_is_in_use():
    """Else the peak of the second map would be missed."""
    with sampled() as sample:
        assert list(passes(range(0, 8, 2), "a")) == [0]
        assert list(passes(range(0, 8, 2), "a")) == []
        held = mx.zeros((1 << 20,))
        mx.eval(held)
        assert list(passes(range(0, 8, 2), "a")) == [0]
        assert list(passes(range(0, 8, 2), "b")) == [0]
    assert sample.left_out == 3 + 4 + 3 + 3
    assert list(passes(range(0, 8, 2), "a")) == [0, 2, 4, 6]


@pytest.mark.parametrize("bits", [0, 4])
def test_a_product_is_traced_by_one_part_of_its_weight(monkeypatch, bits):
    """Forward and back: bytes of all parts, seconds of about as many."""
    monkeypatch.setattr(cpu, "WEIGHT_BYTES", 1 << 20)
    x = mx.array(philox.normal(0, shape=(1, 512, 1024))).astype(mx.bfloat16)
    weight = mx.array(philox.normal(1, shape=(4096, 1024))).astype(mx.bfloat16)
    packed = mx.quantize(weight, group_size=64, bits=bits) if bits else ()
    mx.eval(x, weight, packed)

    def product(x):
        return [cpu.quantized_matmul(x, *packed, 64, bits) if bits else cpu.matmul(x, weight)]

    def run():
        mx.eval(mx.vjp(product, [x], [mx.ones((1, 512, 4096), mx.bfloat16)]))

    whole, _ = planner.measured(run)
    calls = []
    monkeypatch.setattr(cpu, "_seconds", lambda *shape: calls.append(shape) or 0.01)
    peak, seconds, strips = planner.traced(run)
    assert calls == [(512, 1024, 256), (512, 4096, 64)], "a part of each way is timed"
    assert not strips
    assert peak == pytest.approx(whole, abs=6 * cpu.WEIGHT_BYTES + whole / 10), "some parts are at work side by side"
    assert seconds > 2 * (16 - cpu.SAMPLED) * 0.01, "and counted for all that were left out"
