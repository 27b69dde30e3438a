"""What fits this machine: the least peaks that `estimate` found for the known models, stored in the package.

The file is made by examples/bench/fits.py, because tracing takes minutes a model. It may lack models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.events import Table
from mlx_blockskip.tasks.memory.limit import fits

GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """A model in a precision. peaks: the least MLX memory of a whole run, bytes, by share of skipped blocks ("0.5").
    fits: whether each fits the automatic budget, with the margin of what is chosen for a user.
    """

    model: str
    precision: str
    peaks: dict[str, int]
    fits: dict[str, bool]


def path() -> Path:
    """The stored figures."""
    return Path(str(resources.files("mlx_blockskip") / "assets" / "doctor" / "fits.json"))


def read() -> dict[str, Any]:
    """backend, mlx: what the figures were traced on; models: peaks by name, precision and ratio. None without it."""
    return files.read_json(path()) if path().is_file() else {"backend": "-", "mlx": "-", "models": {}}


def judged(models: Mapping[str, Mapping[str, Mapping[str, int]]], budget: int) -> tuple[Fit, ...]:
    """Every stored model and precision against a budget in bytes."""
    return tuple(
        Fit(model, precision, dict(peaks), {ratio: fits(peak, budget) for ratio, peak in peaks.items()})
        for model, precisions in models.items()
        for precision, peaks in precisions.items()
    )


def table(found: tuple[Fit, ...], budget: int, traced_on: str) -> Table:
    """The least peaks for a person; what does not fit is in brackets."""
    ratios = sorted({ratio for fit in found for ratio in fit.peaks}, key=float)

    def cell(fit: Fit, ratio: str) -> str:
        if ratio not in fit.peaks:
            return "-"
        peak = f"{fit.peaks[ratio] / GIB:.2f}"
        return peak if fit.fits[ratio] else f"({peak})"

    return Table(
        f"Least peak of MLX memory, GiB, by share of skipped blocks (traced on {traced_on}; in brackets what does not "
        f"fit {budget / GIB:.1f} GiB)",
        ("model", "weights", *(f"{float(ratio):.0%}" for ratio in ratios)),
        tuple((fit.model, fit.precision, *(cell(fit, ratio) for ratio in ratios)) for fit in found),
    )
