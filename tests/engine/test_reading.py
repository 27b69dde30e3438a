"""A block's tensors are read together, as many as there is room for, and never more bytes than that."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import mlx.core as mx
import pytest
from engine.test_sweep import make

from mlx_blockskip.engine import limits
from mlx_blockskip.engine.reader import BlockReader, Prefetch
from mlx_blockskip.engine.shards import Shards
from support.compare import same_bits
from support.component import save_component

SIZES = [4, 3, 2, 5]


def test_room_is_taken_for_as_many_tensors_as_fit_in_order():
    room = Prefetch()
    room.begin(8)
    assert room.take(SIZES) == 2, "4 + 3 of 8; the 2 would be one too many"
    assert room.ahead == 7
    assert room.take([1, 1]) == 1
    room.begin(None)
    assert room.take(SIZES) == 4, "any number of bytes"


def test_what_does_not_fit_waits_until_the_block_at_work_is_done():
    room = Prefetch()
    room.begin(3)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(room.take, SIZES)
        with pytest.raises(TimeoutError):
            taken.result(0.05)
        room.done()
        assert taken.result(10) == 4
        room.begin(3)
        taken = pool.submit(room.take, SIZES)
        room.cancel()
        with pytest.raises(CancelledError):
            taken.result(10)


@pytest.fixture
def evaluated(monkeypatch):
    """Sizes of the arrays of each mx.eval."""
    found, own = [], mx.eval

    def observed(*arrays):
        found.append([array.nbytes for array in arrays[0]] if isinstance(arrays[0], list) else None)
        own(*arrays)

    monkeypatch.setattr(mx, "eval", observed)
    return found


def test_tensors_are_evaluated_together_as_room_is_granted(tmp_path, evaluated):
    tensors = {f"t{size}": mx.full((size,), float(size)) for size in SIZES}
    shards = Shards(save_component(tmp_path / "m", {}, tensors))
    asked, granted = [], iter((2, 1, 1))

    def room(sizes):
        asked.append(list(sizes))
        return next(granted)

    evaluated.clear()
    loaded = shards.load(tensors, room)
    assert asked == [[16, 12, 8, 20], [8, 20], [20]]
    assert evaluated == [[16, 12], [8], [20]]
    evaluated.clear()
    shards.load(tensors)
    assert evaluated == [[16, 12, 8, 20]]
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("tensors_ahead", [0, 1, 2, 3])
def test_bytes_in_flight_never_exceed_the_room(tmp_path, monkeypatch, tensors_ahead):
    """Observed where they are read: beside a block at work no more than the room, and no fewer where they fit."""
    stack, shards = make(tmp_path / "m", 6, 64)
    reader = BlockReader(shards, stack, 0)
    tensor, rooms, read, waiting = 64 * 64 * 4, [], [], threading.Event()
    begin, take, own = Prefetch.begin, Prefetch.take, mx.eval

    def begun(flight, _):
        begin(flight, tensors_ahead * tensor + 1)
        rooms.append([])
        waiting.clear()

    def taken(flight, sizes):
        if not flight._fits(sizes[0]):
            waiting.set()
        return take(flight, sizes)

    def observed(*arrays):
        if threading.current_thread() is not threading.main_thread() and flights[-1].at_work:
            rooms[-1].append(len(arrays[0]))
        own(*arrays)
        read.append(1)

    flights = []
    made = Prefetch.__init__
    monkeypatch.setattr(Prefetch, "__init__", lambda flight: (made(flight), flights.append(flight))[0])
    monkeypatch.setattr(Prefetch, "begin", begun)
    monkeypatch.setattr(Prefetch, "take", taken)
    monkeypatch.setattr(mx, "eval", observed)
    for index, weights in reader.walk(range(6)):
        if index < 5 and tensors_ahead < 3:
            assert waiting.wait(60)
        del weights
    assert all(sum(together) <= tensors_ahead for together in rooms)
    if tensors_ahead < 3:
        assert all(together == [tensors_ahead] * bool(tensors_ahead) for together in rooms[:-1]), rooms


def test_mlx_does_not_wait_for_one_tensor_after_the_other_where_no_block_is_at_work(tmp_path, monkeypatch):
    """Its memory limit has room for the block that is read, from before the reading goes on."""
    stack, shards = make(tmp_path / "m", 3)
    reader, found, done = BlockReader(shards, stack, 0), [], Prefetch.done

    def watched(flight):
        found.append(mx.set_memory_limit(1))
        mx.set_memory_limit(found[-1])
        done(flight)

    monkeypatch.setattr(Prefetch, "done", watched)
    before = mx.set_memory_limit(1)
    try:
        limits.bound(0)
        for _, weights in reader.walk(range(3)):
            del weights
    finally:
        limits.bound(None)
        mx.set_memory_limit(before)
    assert len(found) == 3
    assert all(limit >= reader.nbytes(0) for limit in found)
