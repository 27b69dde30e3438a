"""Find families: sub-packages of `models` that export FAMILY, and the entry points of other distributions."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import mlx_blockskip.models as models
from mlx_blockskip.engine import files, manifest
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.schedulers import FILE

GROUP = "mlx_blockskip.families"


@cache
def families() -> dict[str, Family]:
    """Every family that is installed, by name."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(models.__path__, models.__name__ + "."):
        if module.ispkg:
            family = getattr(importlib.import_module(module.name), "FAMILY", None)
            if isinstance(family, Family):
                found[family.name] = family
    for entry in entry_points(group=GROUP):
        family = entry.load()
        found[family.name] = family
    return found


def find_family(model_index: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face checkpoint, by its model_index.json. Raises UserError where none takes it."""
    for family in families().values():
        if family.detect(model_index):
            return family
    name = model_index.get("_class_name", "without a pipeline name")
    raise UserError(f"a checkpoint of {name} is not supported; the families are {', '.join(sorted(families()))}")


def family_named(name: str) -> Family:
    """The family of this name. Raises UserError where it is not installed."""
    try:
        return families()[name]
    except (KeyError, TypeError):  # not there, or a config says it by something else than a text
        raise UserError(f"the family {name!r} is not installed; there are {', '.join(sorted(families()))}") from None


def own_defaults(checkpoint: Path, family: Family) -> dict[str, Any]:
    """The settings that a checkpoint in Hugging Face layout has of its own: what its model_index.json and the config of
    its scheduler tell, and over that a `defaults.json` beside it.
    """
    index, own = checkpoint / "model_index.json", checkpoint / "defaults.json"
    scheduler = checkpoint / "scheduler" / FILE
    found = family.variant(files.read_json(index), files.read_json(scheduler)) if index.is_file() else {}
    return {**found, **(files.read_json(own) if own.is_file() else {})}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of an MLX model directory, checked to be one. Raises UserError."""
    config = files.read_json(path / "config.json")
    if not isinstance(config, dict) or "family" not in config or "format" not in config:
        raise UserError(f"{path}: is not an MLX model directory; make one with `mlx-blockskip convert`")
    if config["format"] != 1:
        raise UserError(f"{path}: has format {config['format']}, and this version reads format 1; update or reconvert")
    return config


def open_model(path: Path, budget: int | None = None) -> DiffusionModel:
    """Open an MLX model directory. Weights are read as they are needed."""
    family = family_named(read_config(path)["family"])
    manifest.check(path)
    return family.open(path, budget)
