"""Runs that an error of the device stops, in every part of a step: what is saved, and that a resumed run ends the same.

There is no such device here: the errors are raised by stand-ins where MLX raises them.
"""

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_blockskip import train
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train import loop
from mlx_blockskip.tasks.train import train as train_task
from support.compare import assert_same_adapter
from support.metal import FAILED
from support.models import HEDGEHOG

STEP = 3
"""Steps that are done before the one that fails; the checkpoint before is that of step 2."""


def fails(monkeypatch, owner, name, state, after=0):
    """Once: the call of this function that comes `after` others in the step that is to fail."""
    given, calls, failed = getattr(owner, name), [], []

    def failing(*arguments, **options):
        if state() == STEP and not failed:
            calls.append(name)
            if len(calls) > after:
                failed.append(name)
                raise RuntimeError(FAILED)
        return given(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


PARTS = {
    "backward": (mx, "eval", 2, 3),
    "norm": (loop.optimizer, "global_norm", 0, 3),
    "update, its first block": (optim.AdamW, "apply_gradients", 0, 2),
    "update, its second block": (optim.AdamW, "apply_gradients", 1, 2),
}
"""By the part of a step: what fails there, in which of its calls, and the checkpoint that is there afterwards."""


@pytest.mark.parametrize("budget", ["0", "any"])
@pytest.mark.parametrize("part", [*PARTS, "end of the step"])
def test_a_run_goes_on_from_what_was_whole_to_the_same_adapter(toy, tmp_path, monkeypatch, part, budget):
    fixed = {"model": str(toy), "data": str(HEDGEHOG), "resolution": 64, "train_resolution": 32, "class_images": 0}
    fixed |= {"iters": 5, "rank": 2, "steps_per_save": 2, "skip_first": 1, "skip_last": 0, "memory_budget": budget}
    whole = train(TrainSettings(**fixed, adapter_path=str(tmp_path / "whole"))).adapter_path
    states, first = [], train_task.first_state
    with monkeypatch.context() as patched:
        patched.setattr(train_task, "first_state", lambda job: states.append(first(job)) or states[-1])
        if part == "end of the step":  # the update was scheduled, and turns out to have failed
            owner, name, after, saved = mx, "synchronize", 0, 2
            fails(
                patched, owner, name, lambda: STEP if states and not states[-1].whole and states[-1].step > STEP else 0
            )
        else:
            owner, name, after, saved = PARTS[part]
            fails(patched, owner, name, lambda: states[-1].step if states else 0, after)
        with pytest.raises(UserError, match=f"step-00000{saved}") as found:
            train(TrainSettings(**fixed, adapter_path=str(tmp_path / "stopped")))
    said = "the step under way is lost" if saved == 2 else "is saved: go on with"
    assert said in str(found.value)
    names = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert names[-1] == f"step-00000{saved}"
    again = train(TrainSettings(**fixed, adapter_path=str(tmp_path / "stopped"), resume=True)).adapter_path
    assert_same_adapter(whole, again)
