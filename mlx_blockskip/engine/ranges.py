"""What a number may be, as a part of its type: `Annotated[int, Range(1, 8)]`."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both of which are finite. above, below: without that end itself."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether a number is one of these; what is not a number (NaN) is in no range."""
        low = value > self.least if self.above else value >= self.least
        return bool(low and (value < self.most if self.below else value <= self.most))

    def __str__(self) -> str:
        """What a number must be, as the end of a sentence."""
        low = f"{'above' if self.above else 'at least'} {self.least}"
        return f"{low} and {'below' if self.below else 'at most'} {self.most}"


UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


@dataclass(frozen=True)
class Sizes(Range):
    """Bytes, written as 2GB or 512MB. words: what may stand there instead."""

    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        low, high = (written(int(end)) for end in (self.least, self.most))
        return f"at least {low} and at most {high}"


def written(count: int) -> str:
    """Bytes as a user writes them: 8GB."""
    unit = next((u for u in ("TB", "GB", "MB", "KB") if count and count % UNITS[u] == 0), "")
    return f"{count // UNITS[unit]}{unit}"


def range_in(hint: Any) -> Range | None:
    """The range that a type carries, also inside `X | None` and `list[X]`; None where it has none."""
    if get_origin(hint) is Annotated:
        own = next((rule for rule in get_args(hint)[1:] if isinstance(rule, Range)), None)
        return own or range_in(get_args(hint)[0])
    return next((found for part in get_args(hint) if (found := range_in(part)) is not None), None)
