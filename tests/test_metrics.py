"""Cosine of embeddings, against hand-made cases."""

import numpy as np
import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.metrics import distance, mean_among, mean_pairwise, pairwise, unit

RIGHT, UP, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
HALF = 0.5**0.5


def rows(*vectors):
    return np.array(vectors, np.float32)


def test_pairwise_is_the_cosine_of_every_pair():
    expected = [[1, 0, HALF], [0, 1, HALF]]
    np.testing.assert_allclose(pairwise(rows(RIGHT, UP), rows(RIGHT, UP, DIAGONAL)), expected, atol=1e-12)


def test_lengths_do_not_matter_and_opposites_are_minus_one():
    np.testing.assert_allclose(pairwise(rows([3, 0]), rows([1e-6, 0], [-70, 0])), [[1, -1]], atol=1e-12)


def test_distance_pairs_rows():
    found = distance(rows(RIGHT, RIGHT, RIGHT, DIAGONAL), rows([2, 0], UP, [-1, 0], RIGHT))
    np.testing.assert_allclose(found, [0, 1, 2, 1 - HALF], atol=1e-12)


def test_mean_pairwise_is_over_all_pairs():
    assert mean_pairwise(rows(RIGHT, UP), rows(RIGHT, DIAGONAL)) == pytest.approx((1 + HALF + 0 + HALF) / 4)


def test_mean_among_leaves_a_row_with_itself_out():
    assert mean_among(rows(RIGHT, UP, DIAGONAL)) == pytest.approx((0 + HALF + HALF) / 3)
    assert mean_among(rows(RIGHT)) is None


def test_float16_rows_are_summed_wide():
    row = np.full((1, 4096), 30.0, np.float16)  # its square sum is beyond float16
    assert pairwise(row, row)[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_row_without_direction_is_refused(bad):
    with pytest.raises(UserError, match="no direction"):
        unit(rows(RIGHT, bad))


def test_rows_that_do_not_pair_are_a_bug():
    with pytest.raises(ValueError, match="do not pair"):
        distance(rows(RIGHT, UP), rows(RIGHT))
