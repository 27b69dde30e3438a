"""`doctor`: what a machine's owner runs first."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import leftovers, limits
from mlx_blockskip.events import Note, Step, Warning, emit
from mlx_blockskip.settings import DoctorSettings
from mlx_blockskip.tasks.doctor import bench, checks, fits, machine, trials
from mlx_blockskip.tasks.doctor.bench import Bench
from mlx_blockskip.tasks.doctor.machine import Machine
from mlx_blockskip.tasks.doctor.report import Report
from mlx_blockskip.tasks.doctor.trials import Check
from mlx_blockskip.tasks.doctor.workshop import Workshop
from mlx_blockskip.tasks.phases import phase

TOP, BOTTOM = "---- paste into an issue ----", "---- to here ----"


def doctor(settings: DoctorSettings) -> Report:
    """Examine this machine, say what fits it, and test results on it. See `DoctorSettings` for the options."""
    started = time.perf_counter()
    found = machine.examine(timed=settings.bench or not settings.quick)
    emit(machine.table(found))
    for text in machine.advice(found):
        emit(Note(text))
    stored = fits.read()
    fitting = fits.judged(stored["models"], found.budget)
    if fitting:
        emit(fits.table(fitting, found.budget, stored["backend"]))
    with leftovers.scratch_directory() as directory, _as_it_was():
        tested = _tested(settings, directory)
        benched = _benched(found, directory) if settings.bench else None
    report = Report(found, fitting, tested, benched, time.perf_counter() - started)
    emit(Note("\n".join(("", TOP, report.text(), BOTTOM))))
    return report


def _tested(settings: DoctorSettings, directory: Path) -> tuple[Check, ...]:
    done: list[Check] = []
    with phase("self-test", len(checks.TRIALS), "check"):

        def one_more(check: Check) -> None:
            done.append(check)
            emit(Step("self-test", len(done)))

        found = checks.examine(directory, settings.quick, one_more)
    emit(trials.table(found))
    for check in found:
        if check.status == trials.FAILED:
            emit(Warning(f"{check.name}: {check.found}. {check.means}"))
    return found


def _benched(found: Machine, directory: Path) -> Bench:
    with phase("bench", None, "part"):
        count = iter(range(1, 1000))
        measured = bench.measure(
            Workshop(directory), found.disk_speed, found.budget, lambda _: emit(Step("bench", next(count)))
        )
    for table in bench.tables(measured):
        emit(table)
    return measured


@contextmanager
def _as_it_was() -> Iterator[None]:
    """The limits of MLX are afterwards what they were before."""
    cache = mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    try:
        yield
    finally:
        limits.bound(None)
        mx.set_cache_limit(cache)
        mx.clear_cache()
