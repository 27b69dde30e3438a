"""What the doctor finds: values, one JSON document of them, and the lines to paste into an issue."""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_blockskip import __version__
from mlx_blockskip.display import memory
from mlx_blockskip.tasks.doctor.bench import Bench
from mlx_blockskip.tasks.doctor.fits import Fit
from mlx_blockskip.tasks.doctor.machine import Machine
from mlx_blockskip.tasks.doctor.trials import FAILED, PASSED, SKIPPED, Check

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """machine, fits, checks: always. bench: where it was asked for. seconds: the whole visit."""

    machine: Machine
    fits: tuple[Fit, ...]
    checks: tuple[Check, ...]
    bench: Bench | None
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return not self.with_status(FAILED)

    def with_status(self, status: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == status)

    def document(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"format": FORMAT, "version": __version__, "healthy": self.healthy, **asdict(self)}

    def text(self) -> str:
        """A few lines that say all that helps to understand a problem, and nothing of whose machine it is."""
        machine = self.machine
        recommended = "" if machine.recommended is None else f", {memory(machine.recommended)} recommended"
        counts = [f"{len(self.with_status(status))} {status}" for status in (PASSED, FAILED, SKIPPED)]
        lines = [
            f"mlx-blockskip {__version__}, mlx {machine.mlx}, Python {machine.python}",
            f"{machine.system}, {machine.chip}, {machine.computes_on}{', TRANSLATED' if machine.translated else ''}",
            f"{memory(machine.memory)}{recommended}, budget {memory(machine.budget)}",
            *(f"{name}={value}" for name, value in machine.environment.items()),
            f"checks: {', '.join(counts)}",
            *(f"FAILED {check.name}: {check.found}" for check in self.with_status(FAILED)),
        ]
        if self.bench is not None:
            lines += [f"{speed.name}: {speed.found}" for speed in self.bench.speeds]
            lines += [f"predicted: {s.model}, {s.precision}: {s.seconds:.3g} s, {s.binds}" for s in self.bench.steps]
        return "\n".join(lines)
