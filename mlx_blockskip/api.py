"""The Python API: each task as a function of its settings' fields."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_blockskip.commands import COMMANDS, function_of
from mlx_blockskip.engine import system
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Listener, listening
from mlx_blockskip.options import ANY_SIZE, changed, from_mapping, options_of, shown, size_of
from mlx_blockskip.settings import (
    CacheSettings,
    ConvertSettings,
    DoctorSettings,
    EstimateSettings,
    EvaluateSettings,
    ExportSettings,
    FuseSettings,
    GenerateSettings,
    SelectSettings,
    TrainSettings,
    UploadSettings,
    VerifySettings,
)

if TYPE_CHECKING:
    from mlx_blockskip.models.family import DiffusionModel
    from mlx_blockskip.tasks.checkpoint.cache import Kept
    from mlx_blockskip.tasks.checkpoint.verify import Verification
    from mlx_blockskip.tasks.doctor.report import Report
    from mlx_blockskip.tasks.estimate import Estimate
    from mlx_blockskip.tasks.evaluate.evaluate import Evaluation
    from mlx_blockskip.tasks.select.select import Selection
    from mlx_blockskip.tasks.train.train import TrainResult

__all__ = [
    "cache", "convert", "doctor", "estimate", "evaluate", "export", "fuse", "generate", "load",
    "select", "train", "upload", "verify",
]  # fmt: skip


def convert(settings: ConvertSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> Path:
    """Convert a Hugging Face checkpoint; returns the MLX model directory. Options: fields of ConvertSettings."""
    return _run("convert", settings, options, on_event)


def train(settings: TrainSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> "TrainResult":
    """Learn a subject; returns where the adapter is. Options: fields of TrainSettings."""
    return _run("train", settings, options, on_event)


def select(settings: SelectSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> "Selection":
    """Choose which blocks to skip; returns the plans and their table. Options: fields of SelectSettings."""
    return _run("select", settings, options, on_event)


def generate(
    settings: GenerateSettings | str | None = None, *, on_event: Listener | None = None, **options: Any
) -> list[Path]:
    """Generate images; returns the PNG files. Options: fields of GenerateSettings; a text is a prompt."""
    if isinstance(settings, str):
        settings = GenerateSettings(prompt=[settings])
    return _run("generate", settings, options, on_event)


def estimate(
    settings: EstimateSettings | None = None, *, on_event: Listener | None = None, **options: Any
) -> "list[Estimate]":
    """Say what a run would take; returns a row a precision and skip ratio. Options: fields of EstimateSettings."""
    return _run("estimate", settings, options, on_event)


def evaluate(
    settings: EvaluateSettings | None = None, *, on_event: Listener | None = None, **options: Any
) -> "Evaluation":
    """Measure an adapter; returns its mean scores and where the report is. Options: fields of EvaluateSettings."""
    return _run("evaluate", settings, options, on_event)


def export(settings: ExportSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> Path:
    """Write an adapter for another tool; returns the file (a directory for mlx). Options: fields of ExportSettings."""
    return _run("export", settings, options, on_event)


def fuse(settings: FuseSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> Path:
    """Add adapters to their model's weights; returns the new model's directory. Options: fields of FuseSettings."""
    return _run("fuse", settings, options, on_event)


def verify(
    settings: VerifySettings | None = None, *, on_event: Listener | None = None, **options: Any
) -> "Verification":
    """Hold a directory against what was written there; returns what is wrong. Options: fields of VerifySettings."""
    return _run("verify", settings, options, on_event)


def doctor(settings: DoctorSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> "Report":
    """Say what this machine is and test results on it; returns the report. Options: fields of DoctorSettings."""
    return _run("doctor", settings, options, on_event)


def upload(settings: UploadSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> str:
    """Put an adapter or a model on the Hub; returns its address. Options: fields of UploadSettings."""
    return _run("upload", settings, options, on_event)


def cache(settings: CacheSettings | None = None, *, on_event: Listener | None = None, **options: Any) -> "list[Kept]":
    """List or clear conversions that were kept; returns those that it is about. Options: fields of CacheSettings."""
    return _run("cache", settings, options, on_event)


def load(model: str = "tiny-flux", memory_budget: int | None = None) -> "DiffusionModel":
    """Open a model for use from Python; what has to be converted first is converted silently. memory_budget: bytes."""
    system.require()
    from mlx_blockskip.tasks.checkpoint import resolve
    from mlx_blockskip.tasks.running import running

    budget = None if memory_budget is None else size_of(memory_budget, "memory_budget", ANY_SIZE)
    with running("load"):
        return resolve.open_named(model, budget)


def _run(name: str, given: Any, options: dict[str, Any], on_event: Listener | None) -> Any:
    """Call a command's function with settings, in which options win. Its module is imported now: what one command needs
    no other waits for.
    """
    task, cls = function_of(name), COMMANDS[name]
    if given is not None and not isinstance(given, cls):
        raise UserError(f"{name}: {shown(repr(given))} is not {cls.__name__}; give options by name: {_call(name, cls)}")
    options = {key: _place(value) for key, value in options.items()}
    chosen: Any = from_mapping(cls, options) if given is None else changed(given, **options)
    from mlx_blockskip.tasks.running import running

    with listening(on_event), running(name):
        return task(chosen)


def _call(name: str, cls: type) -> str:
    """An example of a call."""
    return f"{name}({next((f'{option.name}=...' for option in options_of(cls)), '')})"


def _place(value: Any) -> Any:
    """Where an opened model is; any other value itself."""
    return str(value.path) if hasattr(value, "stack") and hasattr(value, "path") else value
