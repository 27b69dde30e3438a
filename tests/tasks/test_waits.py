"""How often a training step waits for the device. On a GPU every wait lets it run dry.

Once a block, a direction and a micro-batch, which is what bounds memory; once a micro-batch for the loss; once for the
norm of all gradients; and once for the update where the moments are in memory. Where there is no room for those, they
and the gradients are read and written a block at a time, and a block's norm and update are waited for. Last of all once
more, so that an error of the device is raised before the step counts.
"""

import threading
from collections import Counter

import mlx.core as mx
import pytest
from conftest import QUICK

from mlx_blockskip import train
from mlx_blockskip.events import Phase, Step
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train import optimizer

PLANS = [{"skip_first": 1, "skip_last": 0}, {"skip_first": 0, "skip_last": 1}]


class Waits:
    """Counts waits of the main thread, a training step at a time; `float` of what was evaluated is none."""

    def __init__(self, monkeypatch):
        self.steps, self.now, self.evaluated = [], Counter(), []
        evaluate, synchronize, number = mx.eval, mx.synchronize, mx.array.__float__

        def counted_eval(*arrays):
            if threading.current_thread() is threading.main_thread():
                self.now["eval"] += 1
                self.evaluated += [id(array) for array in flat(arrays)]
            evaluate(*arrays)

        def counted_synchronize(*stream):
            self.now["synchronize"] += threading.current_thread() is threading.main_thread()
            synchronize(*stream)

        def counted_float(array):
            self.now["float"] += id(array) not in self.evaluated
            return number(array)

        monkeypatch.setattr(mx, "eval", counted_eval)
        monkeypatch.setattr(mx, "synchronize", counted_synchronize)
        monkeypatch.setattr(mx.array, "__float__", counted_float)

    def on_event(self, event):
        if isinstance(event, Step) and event.phase == "train":
            self.steps.append(self.now)
        if isinstance(event, Step | Phase):
            self.now, self.evaluated = Counter(), []


def flat(tree):
    if isinstance(tree, mx.array):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [array for part in parts for array in flat(part)]


def waits(monkeypatch, model, tmp_path, budget, accumulation, plan):
    """Of the third step, when all is as it stays; and the number of retained blocks."""
    retained, update = [], optimizer.update

    def seen(state, grads, *more):
        retained.append(len(grads))
        update(state, grads, *more)

    monkeypatch.setattr(optimizer, "update", seen)
    count = Waits(monkeypatch)
    fixed = {**QUICK, "iters": 3, "steps_per_save": 0, "train_resolution": 32, "resolution": 64, "batch_size": 1}
    options = {**fixed, **plan, "memory_budget": budget, "grad_accumulation": accumulation}
    train(TrainSettings(**options, model=str(model), adapter_path=str(tmp_path / "a")), on_event=count.on_event)
    assert len(count.steps) == 3
    return count.steps[-1], retained[-1]


@pytest.mark.parametrize(("accumulation", "plan"), [(1, PLANS[0]), (3, PLANS[1])])
@pytest.mark.parametrize(
    ("budget", "kept", "in_files"),
    [("0", False, True), ("10MB", False, False), ("256MB", True, False), ("any", True, False)],
)
def test_a_step_waits_for_the_device_as_often_as_memory_needs_it(
    monkeypatch, tiny_flux, tmp_path, budget, kept, in_files, accumulation, plan
):
    found, blocks = waits(monkeypatch, tiny_flux, tmp_path, budget, accumulation, plan)
    assert blocks >= 3
    sweep = blocks * accumulation if kept else (2 * blocks + 1) * accumulation
    norm, update = (2 * blocks + 1, 3 * blocks) if in_files else (1, 1)
    assert found["eval"] == sweep + norm + update, found
    assert found["float"] == 0, "of what was not evaluated yet"
    assert 1 <= found["synchronize"] <= 2 * blocks + 1, (
        "where a block goes to work, to know what is in memory, and last"
    )
