"""A network's configuration as a frozen dataclass: the options that change it, with the reference class's defaults.

A checkpoint's config.json may leave out whatever the reference class fills, and may hold much that changes nothing
(`_class_name`, dtypes, dropout). So what is missing takes the default, what is not a field is ignored, and a field's
type says what is implemented: any other value is refused by name.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError


@dataclass(frozen=True)
class OneOf:
    """The values of an option that are implemented."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class AtLeast:
    """The smallest value that makes sense."""

    value: int


@dataclass(frozen=True)
class Above:
    """What a value has to be greater than."""

    value: int


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
SHOWN = 200
"""Letters of a value that are shown."""

Unset = Annotated[object, OneOf(None)]
"""An option that is not implemented at all."""


MOST_LAYERS, MOST = 1000, 10**8
"""Of blocks, and of anything else that is counted: what is beyond is no network, and would be built for ever."""


class _WrongValueError(ValueError):
    """What is wrong with a value, as the end of a sentence that begins with its name."""


class _NotImplementedValueError(_WrongValueError):
    """A value of the right kind that is not implemented."""


@dataclass(frozen=True)
class Config:
    """The base of every configuration. Values are checked and lists become tuples whenever one is made.

    Raises UserError for a value of a wrong kind and for one that is not implemented, by its name.
    """

    WAY_OUT: ClassVar[str] = "choose a checkpoint with"

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _fitted(hint, value))
            except _NotImplementedValueError as error:
                raise UserError(f"{name}={_json(value)} is not implemented; {self.WAY_OUT} {error}") from None
            except _WrongValueError as error:
                raise UserError(f"{name} is {_json(value)}, where {error} is needed; get the file again") from None
            most = MOST_LAYERS if "layers" in name else MOST
            if any(number > most for number in _numbers(getattr(self, name))):
                raise UserError(f"{name} is {_json(value)}, and {most} is the most of any network; get the file again")
        if problem := self.contradiction():
            raise UserError(f"{problem}; get the file again, or choose another checkpoint")

    def contradiction(self) -> str | None:
        """Why these values do not go together; None where they do."""
        return None

    @classmethod
    def modernised(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """A file's content with today's names for what older files call otherwise."""
        return given

    @classmethod
    def from_dict(cls, given: Any, where: Path | str | None = None) -> Self:
        """The configuration that a file's content stands for. where: the file, to be named in errors.

        Raises UserError for a content that is no mapping, lacks an option without a default, or is refused.
        """
        place = where or cls.__name__
        if not isinstance(given, Mapping):
            raise UserError(f"{place}: is not a config; download the checkpoint again")
        try:
            given = cls.modernised(given)
            for field in fields(cls):
                if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
                    raise UserError(f"lacks {field.name}, which has no default; download the checkpoint again")
            return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})
        except UserError as error:
            raise UserError(f"{place}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configuration in a JSON file. Raises UserError naming the file."""
        return cls.from_dict(files.read_json(path), path)


def _hints(cls: type[Config]) -> dict[str, Any]:
    """The types of the fields, with what is implemented of each."""
    every = get_type_hints(cls, include_extras=True)
    return {field.name: every[field.name] for field in fields(cls)}


def _fitted(hint: Any, value: Any) -> Any:
    """The value as a type wants it: a list as a tuple, a mapping as its dataclass. Raises _WrongValueError.

    The members of a tuple are of one type: `tuple[X, ...]` or, of a fixed length, `tuple[X, X]`.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        base, *rules = get_args(hint)
        try:
            value = _fitted(base, value)
        except _NotImplementedValueError:
            raise
        except _WrongValueError:
            raise _WrongValueError(_kind(hint)) from None
        for rule in rules:
            _check(rule, value, hint)
        return value
    if origin in (Union, UnionType):
        return _fitted_to_one(hint, value)
    if origin is tuple:
        members = get_args(hint)
        if not isinstance(value, (list, tuple)) or (members[-1] is not Ellipsis and len(value) != len(members)):
            raise _WrongValueError(_kind(hint))
        return tuple(_fitted(members[0], part) for part in value)
    if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
        return hint.from_dict(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint not in (bool, object)):
        raise _WrongValueError(_kind(hint))
    return value


def _fitted_to_one(hint: Any, value: Any) -> Any:
    """The value as the first of several types takes it; where none does, what is said of the nearest."""
    refused: list[_WrongValueError] = []
    for member in get_args(hint):
        try:
            return _fitted(member, value)
        except _WrongValueError as error:
            refused.append(error)
    raise next((e for e in refused if isinstance(e, _NotImplementedValueError)), _WrongValueError(_kind(hint)))


def _check(rule: Any, value: Any, hint: Any) -> None:
    if isinstance(rule, OneOf) and value not in rule.values:
        raise _NotImplementedValueError(" or ".join(_json(known) for known in rule.values))
    if (isinstance(rule, AtLeast) and value < rule.value) or (isinstance(rule, Above) and value <= rule.value):
        raise _WrongValueError(_kind(hint))


def _kind(hint: Any) -> str:
    """What a type takes, in words."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *rules = get_args(hint)
        bounds = [f" of at least {rule.value}" for rule in rules if isinstance(rule, AtLeast)]
        bounds += [f" above {rule.value}" for rule in rules if isinstance(rule, Above)]
        return _kind(base) + "".join(bounds)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(member) for member in get_args(hint)))
    if origin is tuple:
        first, last = get_args(hint)[0], get_args(hint)[-1]
        return f"a list{'' if last is Ellipsis else f' of {len(get_args(hint))}'} (each of it {_kind(first)})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}.get(
        hint, "an object"
    )


def _json(value: Any) -> str:
    """A value as the file has it, or its beginning."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a value."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
