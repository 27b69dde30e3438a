"""The commands: of each its settings, and the module that holds its function, which is imported when it is called."""

import importlib
from collections.abc import Callable
from typing import Any, cast

from mlx_blockskip import settings
from mlx_blockskip.engine import system
from mlx_blockskip.engine.errors import UserError

COMMANDS: dict[str, type] = {
    "convert": settings.ConvertSettings,
    "train": settings.TrainSettings,
    "select": settings.SelectSettings,
    "generate": settings.GenerateSettings,
    "estimate": settings.EstimateSettings,
    "evaluate": settings.EvaluateSettings,
    "export": settings.ExportSettings,
    "fuse": settings.FuseSettings,
    "verify": settings.VerifySettings,
    "upload": settings.UploadSettings,
    "cache": settings.CacheSettings,
    "doctor": settings.DoctorSettings,
}

TASKS = {
    "convert": "mlx_blockskip.tasks.checkpoint.convert",
    "train": "mlx_blockskip.tasks.train.train",
    "select": "mlx_blockskip.tasks.select.select",
    "generate": "mlx_blockskip.tasks.generate",
    "estimate": "mlx_blockskip.tasks.estimate",
    "evaluate": "mlx_blockskip.tasks.evaluate.evaluate",
    "export": "mlx_blockskip.tasks.checkpoint.export",
    "fuse": "mlx_blockskip.tasks.checkpoint.fuse",
    "verify": "mlx_blockskip.tasks.checkpoint.verify",
    "upload": "mlx_blockskip.tasks.checkpoint.upload",
    "cache": "mlx_blockskip.tasks.checkpoint.cache",
    "doctor": "mlx_blockskip.tasks.doctor.doctor",
}


def function_of(name: str) -> Callable[[Any], Any]:
    """The function of a command, which takes its settings. Raises UserError where nothing can run on this machine,
    before MLX is used; doctor says that by itself, if it can be imported.
    """
    reason = system.obstacle()
    if reason is None or name == "doctor":
        try:
            return cast(Callable[[Any], Any], getattr(importlib.import_module(TASKS[name]), name))
        except ImportError:
            if reason is None:
                raise
    raise UserError(reason)
