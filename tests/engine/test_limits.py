import os

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


def test_the_machine_says_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": 11 << 30, "memory_size": 16 << 30}
    )
    assert limits.machine() == limits.Machine(16 << 30, 11 << 30)


def test_without_metal_the_machine_has_all_its_memory(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert limits.machine() == limits.Machine(4096 * 1000)


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


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("budget", "metal", "expected"),
    [
        (None, False, limits.Limits(None, None, 64 * MIB, 0)),
        (0, False, limits.Limits(0, 1, 64 * MIB, 0)),
        (32 * GIB, False, limits.Limits(32 * GIB, 30 * GIB, 64 * MIB, 0)),
        (None, True, limits.Limits(None, None, 2 * GIB, 256 * MIB)),
        (0, True, limits.Limits(0, 1, 64 * MIB, 256 * MIB)),
        (100 * MIB, True, limits.Limits(100 * MIB, 1, 64 * MIB, 256 * MIB)),
        (GIB, True, limits.Limits(GIB, 824 * MIB, 128 * MIB, 256 * MIB)),
        (32 * GIB, True, limits.Limits(32 * GIB, 30 * GIB, 2 * GIB, 256 * MIB)),
    ],
)
def test_what_a_budget_comes_to_on_either_backend(budget, metal, expected):
    assert limits.of(budget, metal) == expected


@pytest.mark.parametrize("metal", [False, True])
@pytest.mark.parametrize("scratch", [0, 100 * MIB, 300 * MIB, GIB])
def test_running_ahead_and_what_is_scheduled_beyond_stay_within_what_the_work_was_measured_to_take(scratch, metal):
    ahead = limits.ahead(scratch, metal)
    assert 0 <= ahead <= scratch // 2
    assert ahead + min(scratch, limits.COMMAND_BUFFER if metal else scratch // 2) <= scratch


def test_what_is_in_force_follows_the_budget_and_the_backend(monkeypatch):
    limits.bound(GIB)
    assert limits.in_force() == limits.of(GIB, False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert limits.in_force() == limits.of(GIB, True)
    limits.bound(GIB)
    assert limit() == 824 * MIB
    limits.bound(None)
    assert limits.in_force() == limits.of(None, True)
