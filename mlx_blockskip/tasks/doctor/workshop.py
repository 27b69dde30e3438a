"""Where the self-test works: bundled models converted into a temporary directory, and what the references say."""

import shutil
from collections.abc import Callable
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint.convert import convert_directory
from mlx_blockskip.tasks.checkpoint.resolve import bundled

R = TypeVar("R")


def references_path() -> Path:
    """What every trial of the bundled models came to in float32 on the CPU backend."""
    return Path(str(resources.files("mlx_blockskip") / "assets" / "doctor" / "references.safetensors"))


class Workshop:
    """directory: a temporary one, the caller's to remove. Conversions and runs are made once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._made: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], R]) -> R:
        """What `make` returns, made at the first call of this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def checkpoint(self, name: str, dtype: str) -> Path:
        """The MLX directory of a model or encoder in the package."""
        target = self.directory / f"{name}-{dtype}"
        if not target.exists():
            convert_directory(bundled(name), target, Precision(dtype), name)
        return target

    def model(self, name: str, dtype: str) -> DiffusionModel:
        """A bundled model, opened."""
        return self.once(("model", name, dtype), lambda: open_model(self.checkpoint(name, dtype)))

    def place(self, name: str) -> Path:
        """An empty directory's path."""
        target = self.directory / name
        shutil.rmtree(target, ignore_errors=True)
        return target

    @cached_property
    def references(self) -> dict[str, np.ndarray]:
        """Stored arrays by name. Raises UserError where the file is missing."""
        return _references(references_path())


@cache
def _references(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in files.load_lazily(path).items()}


def as_numpy(value: mx.array) -> np.ndarray:
    """In float64, whatever it was."""
    return np.array(value.astype(mx.float32), np.float64)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square of the difference, in parts of that of what was expected; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    expected = np.asarray(expected, np.float64)
    scale = float(np.sqrt(np.mean(expected**2))) or 1.0
    return float(np.sqrt(np.mean((found - expected) ** 2))) / scale
