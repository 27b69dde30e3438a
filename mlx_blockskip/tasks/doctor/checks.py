"""The self-test: all trials, and what they are held against."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_blockskip.tasks.doctor import kernels, networks, peaks, runs
from mlx_blockskip.tasks.doctor.trials import Check, Trial, hold
from mlx_blockskip.tasks.doctor.workshop import Workshop

TRIALS: tuple[Trial, ...] = (*kernels.TRIALS, *networks.TRIALS, *runs.TRIALS, *peaks.TRIALS)


def chosen(quick: bool) -> tuple[Trial, ...]:
    """The trials of a visit."""
    return tuple(trial for trial in TRIALS if trial.quick or not quick)


def examine(directory: Path, trials: tuple[Trial, ...], done: Callable[[Check], None]) -> tuple[Check, ...]:
    """Hold the trials one after the other. done: told of each check."""
    workshop, found = Workshop(directory), []
    for trial in trials:
        found.append(hold(trial, workshop))
        done(found[-1])
    return tuple(found)


def references(directory: Path) -> dict[str, np.ndarray]:
    """Everything that a visit compares with, computed on this machine."""
    workshop = Workshop(directory)
    return networks.references(workshop) | runs.references(workshop) | peaks.references(workshop)
