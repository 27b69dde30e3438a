"""Measurements begin when all that was scheduled has let go of what it held."""

import mlx.core as mx
import pytest
from engine.test_sweep import make

from mlx_blockskip.engine import memory, planner
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.timeline import recording


class Late:
    """Memory as Metal may count it: what was evaluated holds a MiB more until the device has been waited for."""

    def __init__(self, monkeypatch):
        self.held = 0
        synchronize, active = mx.synchronize, mx.get_active_memory
        monkeypatch.setattr(mx, "synchronize", lambda *a: (synchronize(*a), setattr(self, "held", 0)))
        monkeypatch.setattr(mx, "get_active_memory", lambda: active() + self.held)

    def work(self):
        mx.eval(mx.zeros((1 << 18,)) + 1)
        self.held = 1 << 20


@pytest.fixture
def late(monkeypatch):
    return Late(monkeypatch)


def test_what_is_in_memory_is_read_when_all_is_done(late):
    before = memory.settled()
    late.work()
    assert mx.get_active_memory() > before
    assert memory.settled() == before


def test_a_phase_a_point_of_a_trace_and_a_measurement_count_nothing_that_is_let_go_of(late):
    mx.set_cache_limit(0)
    base = memory.settled()
    late.work()
    memory.reset()
    assert memory.peak() == base
    with recording() as timeline:
        late.work()
    assert {point.active for point in timeline.points} == {base}
    late.work()
    peak, _ = planner.measured(lambda: None)
    assert peak <= 0, "of what was there before"


def test_a_reader_s_measurements_count_nothing_that_is_let_go_of(late, tmp_path):
    stack, shards = make(tmp_path / "m", 4, 256)
    reader, base = BlockReader(shards, stack, 64 << 20), memory.settled()
    for _ in range(3):
        for _, weights in reader.walk(range(4)):
            late.work()
            del weights
    (scratch,) = reader._scratch.values()
    assert reader.overhead["all"] - base - scratch < 1 << 19
