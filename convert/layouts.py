"""How tools other than diffusers call and divide a network's tensors: rules that make their names ours."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_blockskip.converters.views import View, stacked

Shapes = Mapping[str, tuple[int, ...]]
SUFFIXES = {"weight": "weight", "bias": "bias", "scale": "weight"}
"""Of a module's tensors, theirs and ours."""


@dataclass(frozen=True)
class Rule:
    """theirs: a module, or one tensor, with {} for each number in it. ours: what becomes of its rows, from top to
    bottom. shares: how many parts of the rows each gets. swapped: the second half of the rows comes first here.
    """

    theirs: str
    ours: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool = False

    def parts(self, view: View) -> list[View] | None:
        """The view as each of ours has it; None where its rows cannot be so divided."""
        if len(self.ours) == 1 and not self.swapped:
            return [view]
        shares = (1, 1) if self.swapped else self.shares
        if not view.shape or view.shape[0] % sum(shares):
            return None
        part = view.shape[0] // sum(shares)
        firsts = [part * sum(shares[:i]) for i in range(len(shares))]
        found = [view.rows(first, part * share) for first, share in zip(firsts, shares, strict=True)]
        return [stacked(*reversed(found))] if self.swapped else found


def pattern_of(name: str) -> re.Pattern[str]:
    """A name with {} for each number in it, as a regular expression."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


def rule(theirs: str, *ours: str, shares: tuple[int, ...] = (), swapped: bool = False) -> Rule:
    """A rule whose parts are alike where no shares are given."""
    return Rule(theirs, ours, shares or (1,) * len(ours), swapped)


@dataclass(frozen=True)
class Layout:
    """What a network is called in files of one origin.

    mark: a tensor that no other layout has. rules: `(the names in a file) -> rules`; a name that none is for is ours
    already. dropped: names that are not needed, as a regular expression. cleaned: a name without what says nothing.
    """

    mark: str
    rules: Callable[[Collection[str]], Sequence[Rule]] = lambda names: ()
    dropped: str = ""
    cleaned: Callable[[str], str] = lambda name: name

    def prefixes(self, names: Collection[str]) -> set[str]:
        """What is put before the names of a network in this layout, for each that is among these names."""
        cleaned = (self.cleaned(name) for name in names)
        return {n.removesuffix(self.mark) for n in cleaned if n == self.mark or n.endswith(f".{self.mark}")}

    def read(self, views: Mapping[str, View]) -> dict[str, View]:
        """The tensors of a network under our names."""
        cleaned = {self.cleaned(name): view for name, view in views.items()}
        rules = [(pattern_of(r.theirs), r) for r in self.rules(views)]
        return {
            ours: part
            for name, view in cleaned.items()
            if not re.fullmatch(self.dropped, name)
            for ours, part in _renamed(rules, name, view)
        }


def _renamed(rules: Sequence[tuple[re.Pattern[str], Rule]], name: str, view: View) -> Iterator[tuple[str, View]]:
    module, _, suffix = name.rpartition(".")
    for pattern, known in rules:
        if match := pattern.fullmatch(name):
            end = ""
        elif suffix in SUFFIXES and (match := pattern.fullmatch(module)):
            end = f".{SUFFIXES[suffix]}"
        else:
            continue
        if (parts := known.parts(view)) is not None:
            for ours, part in zip(known.ours, parts, strict=True):
                yield ours.format(*match.groups()) + end, part
            return
    yield name, view


@dataclass(frozen=True)
class Network:
    """A component of a family in files that have no config beside them. measured: `(shapes by our names) -> the options
    of its config that they tell`.
    """

    what: str
    layouts: tuple[Layout, ...]
    measured: Callable[[Shapes], dict[str, Any]] = lambda shapes: {}


def numbered(shapes: Shapes, pattern: str) -> int:
    """How many numbers stand in names at the group of a regular expression."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})
