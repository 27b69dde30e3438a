"""The recorder of memory timelines, on the toy family; and peaks that are taken inside one another."""

import gc
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from support.models import random_tree

from mlx_blockskip.engine import memory, sweep, timeline
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Sample
from mlx_blockskip.engine.timeline import FIRST_SWEEPS, Timeline
from mlx_blockskip.lora import attach
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.phases import phase

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
        [Sample(model.tokens(noise, prompt), context)],
        PATH,
        trainable=random_tree(model, PATH),
        loss=lambda i, tokens: mx.mean(mx.square(tokens.image)),
        on_grad=grads.__setitem__,
        bridge=lambda i, start, stop, tokens: tokens,
    )
    waiting = [Sample(model.tokens(noise, prompt), context)]
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


def test_recording_changes_neither_results_nor_measurements(model):
    model.reader.prefetch = False  # how far a thread reads ahead is a matter of time

    def measured():
        model.release()
        gc.collect()
        with phase("work") as track:
            first = there_and_back(model)
            second = there_and_back(model)
        return [np.array(a) for a in (*first, *second)], track.end.peak_memory, dict(model.reader.overhead)

    measured()
    plain = [measured() for _ in range(10)]  # MLX lets go of arrays a little earlier or later
    with timeline.recording() as recorded:
        again, peak_again, overhead_again = measured()
    for arrays, _, _ in plain:
        assert all(np.array_equal(a, b) for a, b in zip(arrays, again, strict=True))
    assert any(peak_again == pytest.approx(peak, rel=0.05) for _, peak, _ in plain)
    assert any(overhead_again == pytest.approx(overhead, rel=0.1) for _, _, overhead in plain)
    assert recorded.phases[0].highest.peak == peak_again
    assert max(point.peak for point in recorded.points if point.phase == 0) == peak_again


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


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_long_run_is_thinned_evenly_and_keeps_the_first_and_the_highest(steps):
    limit = 40
    with timeline.recording(limit) as recorded, phase("work") as track:
        for done in range(1, steps + 1):
            allocate((5 << 20) if done == steps - 3 else (1 << 20))
            track.step(done)
    points = recorded.points
    done = [point.done for point in points if point.what == "step"]
    assert set(range(1, FIRST_SWEEPS + 1)) <= set(done)
    assert steps - 3 in done
    assert recorded.phases[0].highest.done == steps - 3
    assert recorded.phases[0].highest in points
    assert recorded.count == steps + 4
    if steps == 10:
        assert recorded.stride == 1
        assert len(points) == recorded.count
    else:
        assert limit / 2 - 2 <= len(done) - FIRST_SWEEPS - 1 <= limit
        rest = [d for d in done if d > FIRST_SWEEPS and d != steps - 3]
        assert {b - a for a, b in pairwise(rest)} == {recorded.stride}
