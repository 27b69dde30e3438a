"""Randomness as a pure function: numpy's Philox keyed by a seed and a place. No global state anywhere."""

import numpy as np


def generator(seed: int, *place: int) -> np.random.Generator:
    """A generator that depends on the seed and the place (non-negative integers) and on nothing else.

    SeedSequence hashes the seed as entropy and the place as its spawn key, so places of other lengths do not collide.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))


def normal(seed: int, *place: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers in float32."""
    return generator(seed, *place).standard_normal(shape, dtype=np.float32)
