"""The recorder of memory timelines, on the toy family; and peaks that are taken inside one another."""

from itertools import pairwise

import mlx.core as mx
import pytest

from mlx_blockskip.engine import memory, sweep, timeline
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.engine.timeline import FIRST_SWEEPS, Timeline
from mlx_blockskip.events import Phase, listening
from mlx_blockskip.lora import attach
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.phases import phase
from support.compare import same_bits
from support.models import random_tree

PATH = [1, 2, 4]


@pytest.fixture
def model(toy):
    return open_model(toy, 0)


def allocate(size):
    mx.eval(mx.zeros((size // 4,)) + 1)


def there_and_back(model):
    """Losses and gradients of a sweep over PATH, and the state that one over the whole stack ends with."""
    (prompt,) = model.encode_prompts(["a dog"], 6).prompts
    noise = mx.random.normal((1, 6, 6, 4), key=mx.random.key(0))
    context = model.context(mx.array([0.5]), prompt, (6, 6), 1.0)
    grads = {}
    losses = sweep.backward(
        attach(model.stack, 1.0),
        model.reader,
        [Batch(model.embed(noise, prompt), context)],
        PATH,
        trainable=random_tree(model, PATH),
        loss=lambda i, tokens: mx.mean(mx.square(tokens.image)),
        on_grad=grads.__setitem__,
        bridge=lambda i, start, stop, tokens: tokens,
    )
    waiting = [Batch(model.embed(noise, prompt), context)]
    sweep.forward(model.stack, model.reader, waiting)
    arrays = [*losses, waiting[0].state.image, *(g for block in PATH for g in grads[block].values())]
    mx.eval(arrays)
    return arrays


def test_peaks_are_right_inside_one_another():
    mx.set_cache_limit(0)
    base = mx.get_active_memory()
    inner = memory.Peak()
    memory.reset()
    allocate(8 << 20)
    memory.mark()
    allocate(2 << 20)
    inner.restart()
    allocate(1 << 20)
    reached = inner.read() - base
    inner.restart()
    allocate(4)
    assert inner.read() - base < 1 << 20 <= reached < 2 << 20
    assert 2 << 20 <= memory.since_mark() - base < 8 << 20 <= memory.peak() - base
    memory.reset()
    assert memory.peak() == mx.get_active_memory()


def test_blocks_are_recorded_in_the_order_in_which_they_are_visited(model):
    with timeline.recording() as recorded, phase("work") as track:
        there_and_back(model)
        track.step(1)
    visits = [point.visit for point in recorded.points if point.what == "block"]
    depth = model.stack.depth
    assert [(v.direction, v.block) for v in visits] == [
        *(("forward", block) for block in PATH),
        *(("backward", block) for block in reversed(PATH)),
        *(("forward", block) for block in range(depth)),
    ]
    assert all((v.kind, v.prefix) == ("cross", f"blocks.{v.block}.") for v in visits)
    assert all(v.nbytes == model.reader.nbytes(v.block) > 0 for v in visits)
    whats = [point.what for point in recorded.points if point.phase == 0]
    assert (whats[0], whats[-2:]) == ("start", ["step", "end"])
    seconds = [point.seconds for point in recorded.points]
    assert seconds == sorted(seconds)
    assert all(point.peak >= point.active >= 0 for point in recorded.points)


def test_recording_changes_no_result_and_finds_the_phase_s_own_peak(model):
    def worked():
        model.release()
        events = []
        with listening(events.append), phase("work"):
            arrays = [*there_and_back(model), *there_and_back(model)]
        return arrays, events[-1].peak_memory

    plain, _ = worked()
    with timeline.recording() as recorded:
        again, peak = worked()
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))
    assert recorded.phases[0].highest.peak == peak
    assert max(point.peak for point in recorded.points if point.phase == 0) == peak


class Ledger:
    """Stands in for MLX's count of its memory, which differs a little from run to run: only what is said counts."""

    def __init__(self, monkeypatch):
        self.active = self.highest = 1 << 20
        monkeypatch.setattr(mx, "get_active_memory", lambda: self.active)
        monkeypatch.setattr(mx, "get_peak_memory", lambda: self.highest)
        monkeypatch.setattr(mx, "reset_peak_memory", lambda: setattr(self, "highest", 0))

    def work(self, scratch, left=0):
        """Take `scratch` bytes and give back all but `left`."""
        self.highest = max(self.highest, self.active + scratch)
        self.active += left


def test_recording_changes_no_measurement(model, monkeypatch):
    """What the reader measured of the work on blocks, and the peaks of phases, are the same to the byte."""

    def measured():
        ledger, events = Ledger(monkeypatch), []
        model.release()
        for number in range(2):
            with listening(events.append), phase("work") as track:
                for block, weights in timeline.walk(model.reader, PATH + PATH[::-1], "all", "forward", "backward"):
                    ledger.work(500 * (block + 2 - number), left=8)
                    del weights
                track.step(1)
                ledger.work(100_000 * number)
        return (
            [event.peak_memory for event in events if not isinstance(event, Phase)],
            dict(model.reader.overhead),
            dict(model.reader._scratch),
        )

    plain = measured()
    with timeline.recording() as recorded:
        assert measured() == plain
    peaks, overhead, scratch = plain
    assert peaks[0] == peaks[1] == recorded.phases[0].highest.peak
    assert peaks[2] < peaks[3] == recorded.phases[1].highest.peak
    assert overhead["all"] > 0
    assert max(scratch.values()) >= 500 * 3


def test_nothing_is_done_while_nobody_records(model, monkeypatch):
    for name in ("begin", "end", "step", "walk"):
        monkeypatch.setattr(Timeline, name, None)
    with phase("work") as track:
        there_and_back(model)
        track.step(1)
    walk = timeline.walk(model.reader, PATH, "all", "forward")
    assert walk.gi_code is type(model.reader).walk.__code__


def test_a_walk_that_fails_says_why_and_has_a_point(model, monkeypatch):
    get = model.reader._get

    def failing(index, *more):
        if index == 3:
            raise UserError("the disk went away")
        return get(index, *more)

    monkeypatch.setattr(model.reader, "_get", failing)
    with timeline.recording() as recorded, pytest.raises(UserError, match="went away"), phase("work"):
        there_and_back(model)
    assert [p.visit.block for p in recorded.points if p.what == "block"][-4:] == [0, 1, 2, 3]
    assert recorded.phases[0].end is not None


def stepping(steps, limit=40):
    """A recording of so many steps, of which the third last takes most, and the numbers of those that were kept."""
    with timeline.recording(limit) as recorded, phase("work") as track:
        for done in range(1, steps + 1):
            allocate((5 << 20) if done == steps - 3 else (1 << 20))
            track.step(done)
    assert recorded.count == steps + 4
    return recorded, [point.done for point in recorded.points if point.what == "step"]


def test_a_short_run_is_kept_whole():
    recorded, done = stepping(10)
    assert done == list(range(1, 11))
    assert recorded.stride == 1
    assert len(recorded.points) == recorded.count


def test_a_long_run_is_thinned_evenly_and_keeps_the_first_and_the_highest():
    steps, limit = 1000, 40
    recorded, done = stepping(steps, limit)
    assert set(range(1, FIRST_SWEEPS + 1)) <= set(done)
    assert steps - 3 in done
    assert recorded.phases[0].highest.done == steps - 3
    assert recorded.phases[0].highest in recorded.points
    assert limit / 2 - 2 <= len(done) - FIRST_SWEEPS - 1 <= limit
    rest = [d for d in done if d > FIRST_SWEEPS and d != steps - 3]
    assert {b - a for a, b in pairwise(rest)} == {recorded.stride}
