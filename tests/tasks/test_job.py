"""A run's hold on the memory of its model."""

from types import SimpleNamespace

import pytest

from mlx_blockskip.tasks.train.job import Job


def job(ample, budget):
    model = SimpleNamespace(reader=SimpleNamespace(budget=budget), stack=None)
    return Job(None, None, model, None, None, None, ample)


@pytest.mark.parametrize(("ample", "budget", "inside"), [(True, 100, None), (False, 100, 100), (False, 0, 0)])
def test_blocks_stay_in_memory_during_a_step_where_it_is_ample_and_the_budget_holds_after_it(ample, budget, inside):
    own = job(ample, budget)
    with own.resident():
        assert own.model.reader.budget == inside
    assert own.model.reader.budget == budget
    with pytest.raises(KeyboardInterrupt), own.resident():
        raise KeyboardInterrupt
    assert own.model.reader.budget == budget
