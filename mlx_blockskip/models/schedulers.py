"""The schedulers that checkpoints name, as configurations. What is done with them is in `flow`.

Options that only matter where diffusion is not by flow (betas, spacing, clipping) are no fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.config import Config, OneOf, PositiveFloat, PositiveInt

EULER, DPM, CONSISTENCY = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "SCMScheduler"
FILE = "scheduler_config.json"

Off = Annotated[bool | None, OneOf(False, None)]
"""A switch that is not implemented."""


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """What all of them have. num_train_timesteps: into so many a noise level of 1 was divided."""

    WAY_OUT: ClassVar[str] = "use"

    num_train_timesteps: PositiveInt = 1000


@dataclass(frozen=True)
class FlowMatchEulerDiscreteConfig(SchedulerConfig):
    """Source: diffusers FlowMatchEulerDiscreteScheduler."""

    shift: PositiveFloat = 1.0
    use_dynamic_shifting: bool | None = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Annotated[str, OneOf("exponential", "linear")] = "exponential"
    invert_sigmas: Off = False
    shift_terminal: Annotated[float | bool | None, OneOf(None, False)] = None
    use_karras_sigmas: Off = False
    use_exponential_sigmas: Off = False
    use_beta_sigmas: Off = False
    stochastic_sampling: Off = False

    def contradiction(self) -> str | None:
        if self.use_dynamic_shifting and self.max_image_seq_len == self.base_image_seq_len:
            return f"base_image_seq_len and max_image_seq_len are both {self.max_image_seq_len}"
        return None


@dataclass(frozen=True)
class DPMSolverMultistepConfig(SchedulerConfig):
    """Source: diffusers DPMSolverMultistepScheduler, with flow sigmas."""

    use_flow_sigmas: Annotated[bool, OneOf(True)] = False
    flow_shift: PositiveFloat = 1.0
    prediction_type: Annotated[str, OneOf("flow_prediction")] = "epsilon"
    algorithm_type: Annotated[str, OneOf("dpmsolver++")] = "dpmsolver++"
    solver_order: Annotated[int, OneOf(1, 2)] = 2
    solver_type: Annotated[str, OneOf("midpoint", "heun")] = "midpoint"
    final_sigmas_type: Annotated[str, OneOf("zero")] = "zero"
    thresholding: Off = False
    use_lu_lambdas: Off = False
    use_dynamic_shifting: Off = False
    use_karras_sigmas: Off = False
    use_exponential_sigmas: Off = False
    use_beta_sigmas: Off = False


@dataclass(frozen=True)
class SCMConfig(SchedulerConfig):
    """Source: diffusers SCMScheduler."""

    prediction_type: Annotated[str, OneOf("trigflow")] = "trigflow"


SCHEDULERS: Mapping[str, type[SchedulerConfig]] = {
    EULER: FlowMatchEulerDiscreteConfig,
    DPM: DPMSolverMultistepConfig,
    CONSISTENCY: SCMConfig,
}
"""By `_class_name`; a file without one is for the first."""


def parse(given: Any, where: Path | str = "scheduler") -> SchedulerConfig:
    """The scheduler that a scheduler_config.json names. Raises UserError for what is not implemented, by its name."""
    name = given.get("_class_name", EULER) if isinstance(given, Mapping) else EULER
    if not isinstance(name, str) or name not in SCHEDULERS:
        *others, last = SCHEDULERS
        raise UserError(f"{where}: {name} is not implemented; use a checkpoint with {', '.join(others)} or {last}")
    return SCHEDULERS[name].from_dict(given, where)


def read(path: Path) -> SchedulerConfig:
    """The scheduler of a checkpoint or of a model directory. Raises UserError naming the file."""
    file = path / "scheduler" / FILE
    return parse(files.read_json(file), file)
