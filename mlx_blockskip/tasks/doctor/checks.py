"""The self-test: all trials, and what they are held against."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_blockskip.tasks.doctor import kernels, networks, peaks, runs
from mlx_blockskip.tasks.doctor.trials import Check, Trial, hold, skipped
from mlx_blockskip.tasks.doctor.workshop import Workshop

TRIALS: tuple[Trial, ...] = (*kernels.TRIALS, *networks.TRIALS, *runs.TRIALS, *peaks.TRIALS)


LEFT_OUT = "not one of the quick ones"


def examine(directory: Path, quick: bool, done: Callable[[Check], None]) -> tuple[Check, ...]:
    """Hold the trials one after the other; those that are not quick are skipped where that is asked for. done: told of
    each check.
    """
    workshop, found = Workshop(directory), []
    for trial in TRIALS:
        found.append(skipped(trial, LEFT_OUT) if quick and not trial.quick else hold(trial, workshop))
        done(found[-1])
    return tuple(found)


def references(directory: Path) -> dict[str, np.ndarray]:
    """Everything that a visit compares with, computed on this machine."""
    workshop = Workshop(directory)
    return networks.references(workshop) | runs.references(workshop) | peaks.references(workshop)
