import itertools

import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_between():
    first = philox.generator(3, 1, 2).random(5)
    philox.generator(3, 1, 3).random(100)
    np.random.default_rng(3).random(7)
    assert np.array_equal(first, philox.generator(3, 1, 2).random(5))
    assert np.array_equal(first, philox.generator(np.int64(3), np.int32(1), np.int64(2)).random(5))


def test_numpys_global_state_is_neither_read_nor_moved():
    np.random.seed(0)
    before = philox.normal(3, 1, shape=(4,))
    state = np.random.get_state()
    np.random.seed(1)
    assert np.array_equal(before, philox.normal(3, 1, shape=(4,)))
    np.random.seed(0)
    philox.generator(5, 5).random(3)
    assert np.array_equal(state[1], np.random.get_state()[1])


def test_keys_of_any_length_and_seeds_of_any_size_are_streams_of_their_own():
    numbers = (0, 1, 2, 2**31, 2**32 - 1)
    places = [place for length in range(4) for place in itertools.product(numbers, repeat=length)]
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**64 - 1)
    drawn = {philox.generator(seed, *place).bytes(16) for seed in seeds for place in places}
    assert len(drawn) == len(seeds) * len(places)


def test_the_numbers_stay_what_they_were():
    """Runs are resumed and images reproduced by seed: other numbers would be other results."""
    assert philox.generator(0).random(2) == pytest.approx([0.01406704, 0.25776725], abs=1e-8)
    assert philox.generator(7, 1, 2).random(2) == pytest.approx([0.62752613, 0.62940124], abs=1e-8)
    assert philox.normal(7, 1, 2, shape=(2,)) == pytest.approx([-1.5868322, -0.8371813], abs=1e-6)


def test_normal_is_standard_and_float32():
    drawn = philox.normal(1, 2, shape=(100, 3, 100))
    assert drawn.shape == (100, 3, 100)
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02


@pytest.mark.parametrize("seed", [-1, 2**64, 2**200])
def test_a_seed_out_of_range_is_a_users_error(seed):
    with pytest.raises(UserError, match=rf"seed {seed}: must be at least 0"):
        philox.generator(seed, 1)


@pytest.mark.parametrize("place", [(-1,), (2**32,), (0, 2**32 + 5)])
def test_a_number_of_two_words_would_read_as_two_numbers_and_is_refused(place):
    with pytest.raises(ValueError, match="place"):
        philox.generator(0, *place)


@pytest.mark.parametrize("key", [(1.5,), ("1",), (0, 1.5), (0, None)])
def test_only_whole_numbers_are_keys(key):
    with pytest.raises(TypeError):
        philox.generator(*key)
