"""Rounding to bfloat16 that keeps small differences."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.engine.rounding import dithered


def weights(rows=256, width=512):
    return (mx.array(philox.normal(1, shape=(rows, width))) * 0.05).astype(mx.bfloat16)


def test_what_bfloat16_holds_is_left_as_it_is():
    stored = weights()
    assert mx.array_equal(dithered(stored.astype(mx.float32)), stored)
    odd = mx.array([[0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3e38]])
    once = odd.astype(mx.bfloat16)
    assert mx.array_equal(dithered(once.astype(mx.float32)), once)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 2.0])
def test_the_mean_is_exact_where_the_nearest_number_is_not(share):
    stored = weights()
    whole = stored.astype(mx.float32)
    added = mx.abs(whole) * share / 256
    kept, nearest = (
        float((rounded.astype(mx.float32) - whole).sum() / added.sum())
        for rounded in (dithered(whole + added), (whole + added).astype(mx.bfloat16))
    )
    assert kept == pytest.approx(1, abs=0.05 / share**0.5)
    assert share > 0.3 or nearest < 0.05


def test_each_number_goes_to_one_of_its_neighbours():
    values = mx.array(philox.normal(2, shape=(64, 33)))
    found = np.array(dithered(values).astype(mx.float32))
    assert (np.abs(found - np.array(values)) <= np.abs(np.array(values)) / 128).all()


@pytest.mark.parametrize("start", [1, 16, 37])
def test_rows_are_rounded_alike_in_any_parts(start):
    values = mx.array(philox.normal(3, shape=(80, 4, 5)))
    assert mx.array_equal(dithered(values)[start:], dithered(values[start:], start))
