"""Settings as dataclass fields that carry their help, and what is made from such fields: values from YAML, JSON and
Python.
"""

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, asdict, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.ranges import UNITS, Sizes, range_in

S = TypeVar("S")

MOST_SHOWN = 80
"""Letters of a value in a sentence."""


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


class Settings:
    """The base of every command's settings. They are checked when they are made, from wherever they come: a number
    outside the range of its type is refused, and so is what is of another type.

    Raises UserError with the setting's name, the value and what it may be.
    """

    __slots__ = ("given",)

    given: frozenset[str]
    """The settings that were given, though it be with their default's value."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        made = super().__new__(cls)
        made.given = frozenset(named).union(f.name for f, _ in zip(fields(cls), values, strict=False))  # type: ignore
        return made

    def __post_init__(self) -> None:
        for known, hint in _typed_fields(type(self)):  # type: ignore[arg-type]
            value = _checked(known.name, getattr(self, known.name), hint)
            _check_words(known, value)
            setattr(self, known.name, value)


@cache
def _typed_fields(cls: type) -> list[tuple[Field, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(known, hints[known.name]) for known in fields(cls)]


def changed(settings: S, **options: Any) -> S:
    """The settings with these given too, checked anew: they may have been assigned to. Raises UserError as
    `from_mapping`.
    """
    usual, given = type(settings)(), settings.given  # type: ignore[attr-defined]
    values = {f.name: getattr(settings, f.name) for f in options_of(type(settings))}
    own = {name: value for name, value in values.items() if name in given or value != getattr(usual, name)}
    return from_mapping(type(settings), {**own, **options})


def from_mapping(cls: type[S], mapping: Mapping[str, Any]) -> S:
    """Settings from keys in snake_case or kebab-case. Raises UserError for unknown keys and wrong values."""
    known = {f.name: f for f in options_of(cls)}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{shown(str(key))}: is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        if name in values:
            raise UserError(f"{key}: is given twice; leave one out")
        if name in PATHS and "" in (value if isinstance(value, list) else [value]):
            raise UserError(_empty(name))
        values[name] = value
    return cls(**values)


def flag(name: str) -> str:
    """What a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as a part of a sentence, however long it is."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 4] + " ..."


def _empty(name: str) -> str:
    return f"{flag(name)}: is empty; name a file or directory, or leave it out"


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it, each item of a list by itself. Raises UserError."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_checked(name, item, inner) for item in values]
    allowed = range_in(hint)
    value = _of_type(name, value, get_args(hint)[0] if allowed else hint)
    if isinstance(allowed, Sizes):
        if value not in allowed.words:
            size_of(value, flag(name), allowed)
    elif allowed and value not in allowed:
        raise UserError(f"{flag(name)} {shown(value)}: must be {allowed}")
    return value


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _of_type(name: str, value: Any, kind: type) -> Any:
    """The value itself, or what it says in this type. Raises UserError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and (number or isinstance(value, str)):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and (number or isinstance(value, Path)):
        return str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{flag(name)}: {shown(repr(value))} is not {KINDS[kind]}")
    return value


def _check_words(known: Field, value: Any) -> None:
    """Raise UserError for text that is none of the choices, names no file, or that no file or prompt can hold."""
    choices = known.metadata["choices"]
    if choices and value is not None and value not in choices:
        name = known.name.upper() if known.metadata["positional"] else flag(known.name)
        raise UserError(f"{name}: {shown(repr(value))} is not one of {', '.join(map(str, choices))}")
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if known.name in PATHS and not text and known.default != "":
            raise UserError(_empty(known.name))
        if "\0" in text:
            raise UserError(f"{flag(known.name)}: holds a NUL character; leave it out")
        if known.name not in PATHS and not text.isascii() and text.encode(errors="replace").decode() != text:
            raise UserError(f"{flag(known.name)} {text!r}: is not UTF-8; write it again")


def merge(cls: type[S], config: str | None, overrides: Mapping[str, Any]) -> S:
    """Settings from a YAML file and from what the command line gave, which wins."""
    if not config:
        return from_mapping(cls, overrides)
    from mlx_blockskip.yaml_files import read_yaml

    return from_mapping(cls, {**read_yaml(config), **overrides})


def to_mapping(settings: Any) -> dict[str, Any]:
    """The settings as JSON values."""
    return asdict(settings)


def options_of(cls: type) -> list[Field]:
    """The fields, with a command's own before those that it shares with others."""
    own = [f for f in fields(cls) if f.name in cls.__annotations__]
    return own + [f for f in fields(cls) if f not in own]


ANY_SIZE = Sizes(0, 2**50)


def parse_size(text: str | int | None, name: str) -> int | None:
    """Bytes of "2GB", "512MB", "1.5GiB" or a number (units are powers of 1024). Raises UserError."""
    return None if text is None else size_of(text, name, ANY_SIZE)


def size_of(text: str | int, name: str, allowed: Sizes) -> int:
    """Bytes of a size as a user writes it. Raises UserError for what is none and for what is not allowed."""
    match = re.fullmatch(r"\s*(-?[\d.]+)\s*([KMGT]?)I?(B?)\s*", str(text).upper())
    try:
        if match is None:
            raise ValueError
        count = float(match[1]) * UNITS[match[2] + "B" if match[2] else ""]
    except ValueError:
        raise UserError(f"{name}: {shown(repr(text))} is not a size; write it as 2GB or 512MB") from None
    if count not in allowed:
        raise UserError(f"{name} {shown(text)}: must be {allowed}")
    return int(count)
