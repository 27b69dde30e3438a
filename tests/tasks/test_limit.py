"""What a run keeps to, and what it says of it."""

import mlx.core as mx
import pytest
from conftest import QUICK

from mlx_blockskip import train
from mlx_blockskip.engine import limits
from mlx_blockskip.engine.limits import Machine
from mlx_blockskip.events import Note
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.memory.limit import automatic, described
from mlx_blockskip.tasks.phases import phase

GIB = 1 << 30


def test_auto_leaves_a_fifth_of_what_metal_recommends_and_a_quarter_of_all_there_is_elsewhere():
    assert automatic(Machine(16 * GIB, 10 * GIB)) == 8 * GIB
    assert automatic(Machine(16 * GIB)) == 12 * GIB


@pytest.mark.parametrize(
    ("budget", "metal", "said"),
    [
        (None, False, "No memory budget; up to 64 MiB of freed buffers are kept"),
        (0, True, "Memory budget 0, the least that is possible; up to 64 MiB of freed buffers are kept"),
        (GIB, False, "Memory budget 1.00 GiB: MLX waits at 960 MiB; up to 64 MiB of freed buffers are kept"),
        (
            8 * GIB,
            True,
            "Memory budget 8.00 GiB: MLX waits at 7.50 GiB; up to 1.00 GiB of freed buffers are kept; "
            "blocks that stay in memory leave 256 MiB free",
        ),
    ],
)
def test_the_limits_are_said_in_a_sentence(budget, metal, said):
    assert described(limits.of(budget, metal)) == said


@pytest.mark.parametrize("metal", [False, True])
def test_a_phase_keeps_the_freed_buffers_that_its_budget_allows(monkeypatch, metal):
    monkeypatch.setattr(limits, "on_metal", lambda: metal)
    monkeypatch.setattr(limits, "_budget", GIB)
    with phase("p"):
        found = mx.set_cache_limit(limits.LEAST_CACHE)
    assert found == (128 << 20 if metal else 64 << 20)


def test_training_names_its_limits_before_anything_else(toy, tmp_path):
    events = []
    fixed = {**QUICK, "iters": 1, "model": str(toy), "train_resolution": 32, "resolution": 64, "plan": "even"}
    fixed |= {"adapter_path": str(tmp_path / "a"), "memory_budget": "1GB"}
    train(TrainSettings(**fixed), on_event=events.append)
    first = next(event for event in events if isinstance(event, Note))
    assert first.message == described(limits.of(GIB, limits.on_metal()))
