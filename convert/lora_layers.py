"""Which layers of a model an adapter may be for, under every name that tools have for them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_blockskip.converters import lora_keys
from mlx_blockskip.converters.layouts import Rule, pattern_of
from mlx_blockskip.converters.whole import Whole
from mlx_blockskip.engine.shards import Shards


@dataclass(frozen=True)
class Target:
    """What a layer of theirs is here: `modules` below one another, each with as many rows as it has. swapped: the
    second half of the rows comes first here.
    """

    modules: tuple[str, ...]
    swapped: bool = False


class Layers:
    """The layers of a transformer. shapes: of their weights as ours have them, by module: (out, in) of a linear layer,
    (out, height, width, in) of a convolution, (n,) of a norm.
    """

    def __init__(self, shards: Shards, rules: Sequence[Rule] = ()):
        whole = Whole(shards)
        self.shapes = {n.removesuffix(".weight"): whole.shape(n) for n in shards.names if n.endswith(".weight")}
        self._targets = {module: Target((module,)) for module in self.shapes}
        self._targets |= dict(self._by_rules(rules))
        self._flat = {name.replace(".", "_"): target for name, target in self._targets.items()}

    def find(self, layer: str) -> Target | None:
        """What a layer of theirs is, by its name in a file; None where the model has none."""
        name = lora_keys.flat(layer)
        if name is not None:
            return self._flat.get(name)
        names = (layer, lora_keys.stripped(layer), lora_keys.stripped(layer).removesuffix(".scale"))
        return next((self._targets[name] for name in names if name in self._targets), None)

    def widths(self, target: Target) -> tuple[int, list[int]]:
        """How many numbers a row has, and how many rows each of the target's modules."""
        shapes = [self.shapes[module] for module in target.modules]
        return math.prod(shapes[0][1:]), [shape[0] for shape in shapes]

    def kernel(self, target: Target) -> tuple[int, int, int] | None:
        """(height, width, in) of a convolution over more than a point; None for all else."""
        shape = self.shapes[target.modules[0]]
        return (shape[1], shape[2], shape[3]) if len(shape) == 4 and shape[1] * shape[2] > 1 else None

    def _by_rules(self, rules: Sequence[Rule]) -> Iterator[tuple[str, Target]]:
        for known in rules:
            first = pattern_of(known.ours[0])
            for module in self.shapes:
                if match := first.fullmatch(module):
                    ours = tuple(name.format(*match.groups()) for name in known.ours)
                    if all(name in self.shapes for name in ours):
                        yield known.theirs.format(*match.groups()), Target(ours, known.swapped)
