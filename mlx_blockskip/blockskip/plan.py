"""Which blocks are skipped while training.

k = n + m is the skip budget: of L blocks the first n and the last m are skipped, and k = floor(ratio x L + 0.5)
(DiT-BlockSkip, section 3.2). A plan may also skip inner runs.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files, sealed
from mlx_blockskip.engine.errors import UserError

DEFAULT_RATIO = 0.5

Run = tuple[int, int]
"""start, stop: blocks start .. stop - 1."""


@dataclass(frozen=True)
class SkipPlan:
    """depth: L. runs: the skipped runs, sorted and apart. source: where the plan came from, for the record.

    Raises UserError for runs outside the stack or overlapping, and where no block is retained.
    """

    depth: int
    runs: tuple[Run, ...]
    source: str = ""

    def __post_init__(self) -> None:
        merged: list[Run] = []
        for start, stop in sorted(self.runs):
            if not 0 <= start <= stop <= self.depth:
                raise UserError(f"skip plan: blocks {start} to {stop} are not within the model's {self.depth} blocks")
            if start == stop:
                continue
            if merged and start < merged[-1][1]:
                raise UserError(f"skip plan: the runs {list(merged[-1])} and {[start, stop]} overlap")
            if merged and start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        if sum(stop - start for start, stop in merged) >= self.depth:
            raise UserError(f"skip plan: all {self.depth} blocks are skipped; at least one must be left to train")
        object.__setattr__(self, "runs", tuple(merged))

    @staticmethod
    def ends(n: int, m: int, depth: int, source: str = "given") -> "SkipPlan":
        """The paper's case: the first n and the last m blocks."""
        if n < 0 or m < 0:
            raise UserError(f"skip plan: n = {n} and m = {m} must be at least 0")
        if n + m >= depth:
            raise UserError(f"skip plan: n = {n} and m = {m} do not leave a block of {depth} to train")
        return SkipPlan(depth, ((0, n), (depth - m, depth)), source)

    @staticmethod
    def from_ratio(ratio: float, depth: int) -> "SkipPlan":
        """An even split: n = ceil(k / 2), m = k - n."""
        k = budget(ratio, depth)
        n = math.ceil(k / 2)
        return SkipPlan.ends(n, k - n, depth, f"even split of ratio {ratio:g}")

    @property
    def retained(self) -> tuple[int, ...]:
        """The blocks that train."""
        skipped = {block for start, stop in self.runs for block in range(start, stop)}
        return tuple(block for block in range(self.depth) if block not in skipped)

    @property
    def n(self) -> int:
        """Length of the leading run."""
        return self.runs[0][1] if self.runs and self.runs[0][0] == 0 else 0

    @property
    def m(self) -> int:
        """Length of the trailing run."""
        return self.depth - self.runs[-1][0] if self.runs and self.runs[-1][1] == self.depth else 0

    @property
    def later(self) -> tuple[Run, ...]:
        """The skipped runs that need residual features: all but the leading one."""
        return self.runs[1:] if self.n else self.runs

    @property
    def k(self) -> int:
        """Number of skipped blocks."""
        return sum(stop - start for start, stop in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {"depth": self.depth, "runs": [list(run) for run in self.runs], "source": self.source}

    def __str__(self) -> str:
        if not self.runs:
            return f"none of {self.depth} blocks skipped"
        runs = ", ".join(f"{start}-{stop - 1}" for start, stop in self.runs)
        return f"{self.k} of {self.depth} blocks skipped ({runs}; n = {self.n}, m = {self.m})"


def from_json(value: Any, depth: int, source: Path | str) -> SkipPlan:
    """A plan from `{"depth", "runs"}` or `{"n", "m"}` (whole numbers; "depth" is optional with n and m).

    Raises UserError, naming the source, where it is not one, or of another depth.
    """
    try:
        if "n" in value:
            n, m, own_depth = (operator.index(x) for x in (value["n"], value["m"], value.get("depth", depth)))
            runs: tuple[Run, ...] = ()
        else:
            own_depth = operator.index(value["depth"])
            runs = tuple((operator.index(start), operator.index(stop)) for start, stop in value["runs"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f'{source}: not a skip plan; write {{"depth": {depth}, "runs": [[start, stop], ...]}}'
        ) from None
    if own_depth != depth:
        raise UserError(f"{source}: is for a model of {own_depth} blocks, and this one has {depth}")
    try:
        return SkipPlan.ends(n, m, depth, str(source)) if "n" in value else SkipPlan(depth, runs, str(source))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def budget(ratio: float, depth: int) -> int:
    """k = floor(ratio x L + 0.5). Raises UserError for a ratio that is none or that leaves no block."""
    if not 0 <= ratio < 1:
        raise UserError(f"--skip-ratio {ratio}: must be at least 0 and below 1")
    k = math.floor(ratio * depth + 0.5)
    if k >= depth:
        raise UserError(
            f"--skip-ratio {ratio:g}: skips all {depth} blocks; {(depth - 1) / depth:.2f} is about the most"
        )
    return k


def from_selection(value: Mapping[str, Any], ratio: float, depth: int, source: Path | str) -> SkipPlan:
    """The plan of a block selection (`{"depth", "plans": {k: {"n", "m"}}}`) for this ratio.

    Raises UserError where it is none, or of another depth, or does not reach that far.
    """
    k, plans = budget(ratio, depth), value.get("plans")
    if not isinstance(plans, Mapping):
        raise UserError(f"{source}: its `plans` are not by number of blocks; make it again with `mlx-blockskip select`")
    if value.get("depth") != depth:
        raise UserError(f"{source}: is for a model of {value.get('depth')} blocks, and this one has {depth}")
    if k == 0:
        return SkipPlan.ends(0, 0, depth, str(source))
    if str(k) not in plans:
        raise UserError(
            f"{source}: has no plan for {k} of {depth} blocks (ratio {ratio:g}); "
            "make one with `mlx-blockskip select --skip-ratio`"
        )
    return from_json(plans[str(k)], depth, source)


def choose(
    depth: int,
    *,
    ratio: float | None = None,
    first: int | None = None,
    last: int | None = None,
    file: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> SkipPlan:
    """The plan that the settings ask for. `recorded`: the model's plans by ratio (its defaults' `plans`).

    file: a JSON file with one plan, or with the plans of a block selection, of which `ratio` takes one.
    Raises UserError where two ways of giving a plan are used at once.
    """
    given = [name for name, value in _named(ratio, first, last, file) if value]
    if len(given) > 1 and given != ["--skip-ratio", "--plan"]:
        raise UserError(f"{' and '.join(given)}: give only one of them")
    if file is not None:
        value = sealed.opened(Path(file), files.read_json(Path(file).expanduser()), EDITED)
        if "plans" in value:
            return from_selection(value, DEFAULT_RATIO if ratio is None else ratio, depth, file)
        if ratio is not None:
            raise UserError(f"--skip-ratio and --plan: {file} holds a single plan; give only one of them")
        return from_json(value, depth, file)
    if first is not None or last is not None:
        return SkipPlan.ends(first or 0, last or 0, depth)
    ratio = DEFAULT_RATIO if ratio is None else ratio
    plan = (recorded or {}).get(f"{ratio:g}")
    return (
        SkipPlan.from_ratio(ratio, depth) if plan is None else from_json(plan, depth, f"the model's plan for {ratio:g}")
    )


EDITED = f"if you have changed it yourself, take out its {sealed.KEY!r}"


def _named(ratio: float | None, first: int | None, last: int | None, file: str | None) -> Iterable[tuple[str, bool]]:
    yield "--skip-ratio", ratio is not None
    yield "--skip-first/--skip-last", first is not None or last is not None
    yield "--plan", file is not None
