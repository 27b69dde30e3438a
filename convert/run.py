"""What a checkpoint in Hugging Face layout has to hold, by its config files, and whether it does."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import cast

from mlx_blockskip.converters import copied
from mlx_blockskip.converters.source import Source, open_source
from mlx_blockskip.converters.table import Component, Row
from mlx_blockskip.converters.views import FLOATS
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import schedulers
from mlx_blockskip.models.family import Configs

SHOWN = 5


def load_table(family: str) -> ModuleType:
    """The converter module of a family. Raises UserError where there is none."""
    try:
        return importlib.import_module(f"mlx_blockskip.converters.{family}")
    except ModuleNotFoundError as error:
        raise UserError(f"no converter for the family {family!r} is installed ({error})") from error


def open_checkpoint(source: Path, family: str) -> list[tuple[Component, Source]]:
    """Every component with its tensors, checked to be complete and of the right shapes, and what is copied is there.
    Raises UserError.
    """
    found = [open_component(component, source) for component in read_components(source, family)]
    for name in load_table(family).COPIED:
        copied.check(source / name)
    return found


def open_component(component: Component, source: Path) -> tuple[Component, Source]:
    """A component with its tensors, checked to be complete and of the right shapes. Raises UserError."""
    opened = open_source(source / component.folder)
    check_rows(component, opened)
    return component, opened


def read_components(source: Path, family: str) -> list[Component]:
    """The components of a checkpoint, by its config files alone. Raises UserError for what is not implemented, by the
    file, the option and its value: in a network or in the scheduler.
    """
    schedulers.read(source)
    configs = {name: files.read_json(source / name / "config.json") for name in load_table(family).FOLDERS}
    return components_of(family, configs, source)


def components_of(family: str, configs: Configs, source: Path | None = None) -> list[Component]:
    """The components that the content of config files stands for, by folder. source: the directory that they are in,
    to be named in errors. Raises UserError.
    """
    table, place = load_table(family), source or Path(family)
    parsed = {name: cls.from_dict(configs[name], place / name / "config.json") for name, cls in table.CONFIGS.items()}
    return cast(list[Component], table.components(parsed))


def check_rows(component: Component, source: Source) -> None:
    """Raise UserError naming tensors that are missing, unexpected or of another shape than the config says."""
    expected: set[str] = set()
    missing, misfit = [], []
    for row in component.rows:
        name = their_name(row, source)
        if name is None:
            missing.append(row.name)
            continue
        expected.update((row.name, *row.aliases))
        view = source.tensors[name]
        if not row.fits(view.shape) or view.dtype not in FLOATS:
            misfit.append(f"{name} ({view.dtype} {list(view.shape)} instead of floats {list(row.their_shape())})")
    extra = [name for name in source.tensors if name not in expected and not component.ignored(_bare(name))]
    for problem, names in (("lacks", missing), ("has unexpected", extra), ("has wrongly shaped", misfit)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UserError(f"{source.place}: {problem} {', '.join(names[:SHOWN])}{more}; {source.misfit}")


def their_name(row: Row, source: Source) -> str | None:
    """The name under which the checkpoint has this row's tensor."""
    return next((name for name in (row.name, *row.aliases) if name in source.tensors), None)


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")
