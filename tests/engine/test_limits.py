import mlx.core as mx
import pytest

from mlx_blockskip.engine import limits


@pytest.fixture(autouse=True)
def _restored():
    before = limit()
    yield
    mx.set_memory_limit(before)


def limit():
    found = mx.set_memory_limit(1)
    mx.set_memory_limit(found)
    return found


def test_a_budget_becomes_mlx_s_limit_and_no_budget_gives_its_own_back():
    limits.bound(None)
    own = limit()
    limits.bound(16 << 20)
    assert limit() == 15 << 20
    limits.bound(0)
    assert limit() == 1
    limits.bound(None)
    assert limit() == own


def test_inside_limits_are_given_back_after_errors_too():
    mx.set_memory_limit(5 << 20)
    with pytest.raises(ZeroDivisionError), limits.tight():
        assert limit() == 1
        raise ZeroDivisionError
    assert limit() == 5 << 20
    with limits.at_least(8 << 20):
        assert limit() == 8 << 20
    with limits.at_least(2 << 20):
        assert limit() == 5 << 20
    assert limit() == 5 << 20


def test_a_tight_limit_keeps_scheduled_operations_from_piling_up():
    def chain():
        x = mx.zeros((1 << 18,))
        for _ in range(40):
            x = x + 1
        return x

    def peak():
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(chain())
        return mx.get_peak_memory() - before

    free = peak()
    with limits.tight():
        bound = peak()
    assert bound <= 4 << 20
    assert bound <= free
