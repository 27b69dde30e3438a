"""Randomness as a pure function: numpy's Philox keyed by a seed and a place. No global state anywhere."""

import operator

import numpy as np

from mlx_blockskip.engine.errors import UserError

SEEDS = 2**64
PLACES = 2**32


def generator(seed: int, *place: int) -> np.random.Generator:
    """A generator that depends on the seed (below 2**64) and the place (integers in [0, 2**32)) and on nothing else.

    SeedSequence hashes the seed as entropy, padded to four 32-bit words where there is a place, and the place as its
    spawn key, one word a number: so no two keys share their words, also where places differ in length. A number of two
    words would read as two numbers, hence the bound. Raises UserError for the seed, ValueError for the place.
    """
    if not 0 <= operator.index(seed) < SEEDS:
        raise UserError(f"seed {seed}: must be at least 0 and below 2**64")
    if not all(0 <= operator.index(number) < PLACES for number in place):
        raise ValueError(f"place {place}: numbers must be at least 0 and below 2**32")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))


def normal(seed: int, *place: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers in float32."""
    return generator(seed, *place).standard_normal(shape, dtype=np.float32)
