"""What fits this machine: the least peaks that `estimate` found for the known models, stored in the package.

The file is made by examples/bench/fits.py, because tracing takes minutes a model. It may lack models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.events import Table
from mlx_blockskip.tasks.memory.limit import fits

GIB = 2**30

Models = Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]
"""Bytes by model, precision, share of skipped blocks and phase."""


DRAWING = ("encode prompts", "generate", "decode")
"""The phases of `generate`; a training run has all the others, and prompts too."""

TRAINING = ("encode prompts", "encode images", "precompute", "train")


@dataclass(frozen=True)
class Fit:
    """A model in a precision with a share of its blocks skipped. phases: the least MLX memory of each, in bytes.
    fits: whether all of them fit the automatic budget, with the margin of what is chosen for a user.
    """

    model: str
    precision: str
    ratio: float
    phases: dict[str, int]
    fits: bool

    def peak(self, phases: Sequence[str]) -> int:
        """Bytes of the largest of these phases."""
        return max(self.phases[name] for name in phases)


def path() -> Path:
    """The stored figures."""
    return Path(str(resources.files("mlx_blockskip") / "assets" / "doctor" / "fits.json"))


def read() -> dict[str, Any]:
    """backend, mlx: what the figures were traced on; models: `Models`, none where there is no file."""
    return files.read_json(path()) if path().is_file() else {"backend": "-", "mlx": "-", "models": {}}


def judged(models: Models, budget: int) -> tuple[Fit, ...]:
    """Everything that is stored against a budget in bytes."""
    return tuple(
        Fit(model, precision, float(ratio), dict(phases), fits(max(phases.values()), budget))
        for model, precisions in models.items()
        for precision, ratios in precisions.items()
        for ratio, phases in ratios.items()
    )


def table(found: tuple[Fit, ...], budget: int, traced_on: str) -> Table:
    """The least peaks for a person, a row a model and precision."""
    ratios = sorted({fit.ratio for fit in found})
    rows: dict[tuple[str, str], dict[float, Fit]] = {}
    for fit in found:
        rows.setdefault((fit.model, fit.precision), {})[fit.ratio] = fit

    def row(fits: dict[float, Fit]) -> tuple[str, ...]:
        training = [f"{fits[r].peak(TRAINING) / GIB:.2f}" if r in fits else "-" for r in ratios]
        least = fits[max(fits)]
        return (*training, f"{least.peak(DRAWING) / GIB:.2f}", "yes" if least.fits else "no")

    return Table(
        f"Least peak of MLX memory, GiB, by share of skipped blocks (traced on {traced_on})",
        ("model", "weights", *(f"train, {ratio:.0%}" for ratio in ratios), "generate", f"fits {budget / GIB:.1f} GiB"),
        tuple((*key, *row(fits)) for key, fits in rows.items()),
    )
