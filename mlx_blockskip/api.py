"""The Python API: each task as a function of its settings' fields."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mlx_blockskip.events import Event, finish
from mlx_blockskip.settings import (
    ConvertSettings,
    EstimateSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    SelectSettings,
    TrainSettings,
    from_mapping,
)
from mlx_blockskip.tasks import adapters
from mlx_blockskip.tasks import convert as convert_task
from mlx_blockskip.tasks import estimate as estimate_task
from mlx_blockskip.tasks import evaluate as evaluate_task
from mlx_blockskip.tasks import generate as generate_task
from mlx_blockskip.tasks import select as select_task
from mlx_blockskip.tasks import train as train_task
from mlx_blockskip.tasks.estimate import Estimate
from mlx_blockskip.tasks.evaluate import Evaluation
from mlx_blockskip.tasks.resolve import load
from mlx_blockskip.tasks.select import Selection
from mlx_blockskip.tasks.train import TrainResult

__all__ = ["convert", "estimate", "evaluate", "export", "generate", "load", "select", "train"]

OnEvent = Callable[[Event], None]
S = TypeVar("S")


def convert(settings: ConvertSettings | None = None, *, on_event: OnEvent | None = None, **options: Any) -> Path:
    """Convert a Hugging Face checkpoint; returns the MLX model directory. Options: fields of ConvertSettings."""
    return finish(convert_task.convert(_settings(ConvertSettings, settings, options)), on_event)


def train(settings: TrainSettings | None = None, *, on_event: OnEvent | None = None, **options: Any) -> TrainResult:
    """Learn a subject; returns where the adapter is. Options: fields of TrainSettings."""
    return finish(train_task.train(_settings(TrainSettings, settings, options)), on_event)


def select(settings: SelectSettings | None = None, *, on_event: OnEvent | None = None, **options: Any) -> Selection:
    """Choose which blocks to skip; returns the plans and their table. Options: fields of SelectSettings."""
    return finish(select_task.select(_settings(SelectSettings, settings, options)), on_event)


def generate(
    settings: GenerateSettings | None = None, *, on_event: OnEvent | None = None, **options: Any
) -> list[Path]:
    """Generate images; returns the PNG files. Options: fields of GenerateSettings."""
    return finish(generate_task.generate(_settings(GenerateSettings, settings, options)), on_event)


def estimate(
    settings: EstimateSettings | None = None, *, on_event: OnEvent | None = None, **options: Any
) -> list[Estimate]:
    """Say what a run would take; returns a row a precision and skip ratio. Options: fields of EstimateSettings."""
    return finish(estimate_task.estimate(_settings(EstimateSettings, settings, options)), on_event)


def evaluate(
    settings: EvaluateSettings | None = None, *, on_event: OnEvent | None = None, **options: Any
) -> Evaluation:
    """Measure an adapter; returns its mean scores and where the report is. Options: fields of EvaluateSettings."""
    return finish(evaluate_task.evaluate(_settings(EvaluateSettings, settings, options)), on_event)


def export(settings: ExportSettings | None = None, *, on_event: OnEvent | None = None, **options: Any) -> Path:
    """Write an adapter for another tool; returns the file. Options: fields of ExportSettings."""
    return finish(adapters.export(_settings(ExportSettings, settings, options)), on_event)


def _settings(cls: type[S], given: S | None, options: dict[str, Any]) -> S:
    if given is None:
        return from_mapping(cls, options)
    from_mapping(cls, options)
    return replace(given, **options)  # type: ignore[type-var]
