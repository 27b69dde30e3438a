"""A trial: a number that is measured here and must not be above a bound. What comes of it is a check."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_blockskip.engine import device
from mlx_blockskip.events import Table, unheard
from mlx_blockskip.tasks.doctor.workshop import Workshop

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Trial:
    """measure: `workshop -> value`. unit: of value and bound. means: what a failure means, and what to do. quick:
    whether it is one of the few that take seconds together.
    """

    name: str
    measure: Callable[[Workshop], float]
    bound: float
    unit: str
    means: str
    quick: bool = False


@dataclass(frozen=True)
class Check:
    """A trial that was held. value: None where it ended in an error or was skipped. note: the error, or why skipped."""

    name: str
    status: str
    value: float | None
    bound: float
    unit: str
    means: str
    seconds: float
    note: str = ""

    @property
    def found(self) -> str:
        """The value against its bound, for a person."""
        if self.value is None:
            return self.note
        sign = "<=" if self.value <= self.bound else ">"
        return f"{self.value:.3g} {sign} {self.bound:.3g} {self.unit}"


def hold(trial: Trial, workshop: Workshop) -> Check:
    """Measure, and judge. Whatever goes wrong is a failure of the trial, never of the visit."""
    started, note, status = time.perf_counter(), "", FAILED
    value: float | None = None
    try:
        with unheard():
            value = float(trial.measure(workshop))
        status = PASSED if value <= trial.bound else FAILED
    except Exception as error:
        if device.is_device_error(error):
            device.drain()  # or the next trial is blamed for it
        note = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if value is not None and not math.isfinite(value):
        value, note = None, f"the value is {value}"
    seconds = time.perf_counter() - started
    return Check(trial.name, status, value, trial.bound, trial.unit, trial.means, seconds, note)


def skipped(trial: Trial, why: str) -> Check:
    """The check of a trial that is not held."""
    return Check(trial.name, SKIPPED, None, trial.bound, trial.unit, trial.means, 0.0, why)


def table(checks: Sequence[Check]) -> Table:
    """The checks for a person, without those that were skipped."""
    held = [check for check in checks if check.status != SKIPPED]
    rows = tuple((check.name, check.status, check.found, f"{check.seconds:.1f}") for check in held)
    return Table("Self-test", ("check", "status", "value", "s"), rows)
