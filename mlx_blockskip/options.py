"""Settings as dataclass fields that carry their help, and what is made from such fields: values from YAML, JSON and
Python.
"""

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mlx_blockskip.engine.errors import UserError

S = TypeVar("S")


def option(
    default: Any,
    help: str,
    *,
    short: str = "",
    choices: tuple = (),
    group: str = "Options",
    positional: bool = False,
) -> Any:
    """A settings field: what the command line needs to know stands beside the default. positional: a word without
    dashes.
    """
    metadata = {"help": help, "short": short, "choices": choices, "group": group, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


PATHS = (
    *("path", "hf_path", "base", "mlx_path", "model", "data", "class_data", "adapter_path", "save_path", "plan"),
    *("trace_memory", "init_adapter"),
    *("prompt_file", "noise", "from_image", "output", "vision_model", "clip_model", "prompts", "drift_prompts"),
)
"""Settings that name a file or a directory: an empty one would mean the working directory."""


def from_mapping(cls: type[S], mapping: Mapping[str, Any]) -> S:
    """Settings from keys in snake_case or kebab-case. Raises UserError for unknown keys and wrong values."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            raise UserError(f"{key}: is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        values[name] = _checked(name, value, hints[name])
    for known in options_of(cls):
        choices = known.metadata["choices"]
        value = values.get(known.name)
        if choices and value is not None and value not in choices:
            raise UserError(f"{known.name}: {value!r} is not one of {', '.join(map(str, choices))}")
        if known.name in PATHS and "" in (value if isinstance(value, list) else [value]):
            raise UserError(f"--{known.name.replace('_', '-')}: is empty; name a file or directory, or leave it out")
    return cls(**values)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_checked(name, item, inner) for item in values]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, (Path, int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{name}: {value!r} is not {'a number' if hint in (int, float) else f'a {hint.__name__}'}")
    return value


def merge(cls: type[S], config: str | None, overrides: Mapping[str, Any]) -> S:
    """Settings from a YAML file and from what the command line gave, which wins."""
    return from_mapping(cls, {**(read_yaml(config) if config else {}), **overrides})


def read_yaml(path: str) -> dict[str, Any]:
    """The keys of a YAML file in snake_case. Raises UserError where it cannot be read."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold `setting: value` lines")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def to_mapping(settings: Any) -> dict[str, Any]:
    """The settings as JSON values."""
    return asdict(settings)


def options_of(cls: type) -> list[Field]:
    """The fields, with a command's own before those that it shares with others."""
    own = [f for f in fields(cls) if f.name in cls.__annotations__]
    return own + [f for f in fields(cls) if f not in own]


def defaults_of(cls: type) -> dict[str, Any]:
    """Each field's default."""
    return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(cls)}  # type: ignore


UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def parse_size(text: str | int | None, name: str) -> int | None:
    """Bytes of "2GB", "512MB", "1.5GiB" or a number (units are powers of 1024). Raises UserError."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)I?(B?)\s*", text.upper())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[match[2] + "B" if match[2] else ""])
    except ValueError:
        raise UserError(f"{name}: {text!r} is not a size; write it as 2GB or 512MB") from None
